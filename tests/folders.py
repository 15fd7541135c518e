"""Adapter folders that tests write, spoil and hand to PEFT."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

import gpt2
import lora
from lora.disk import checkpoint, fingerprint
from tests.toys import IDX, MLP, refused, tiny_gpt2, twin

C_ATTN = "base_model.model.transformer.h.0.attn.c_attn"
# What Unsloth writes as target_modules.
UNSLOTH = (
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?"
    r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r"\.(?:(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj)))"
)


def rewrite(folder, change) -> None:
    """Rewrite the tensors and the metadata of a saved adapter."""
    file = folder / checkpoint.WEIGHTS
    with safe_open(file, "pt") as f:
        tensors, metadata = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()  # noqa: SIM118
    change(tensors, metadata)
    safetensors.torch.save_file(tensors, file, metadata)


def edit(folder, change) -> None:
    """Rewrite the tensors of a saved adapter."""
    rewrite(folder, lambda tensors, _: change(tensors))


def drop_metadata(folder, *names: str) -> None:
    """Drop these metadata of a saved adapter, or all that is ours."""
    ours = names or (checkpoint.DIGEST, checkpoint.SLICES, fingerprint.BASE)
    rewrite(folder, lambda _, metadata: [metadata.pop(name, None) for name in ours])


def edit_config(folder, **fields) -> None:
    """Rewrite the config of a saved adapter, in weights that do not say which one is theirs."""
    file = folder / checkpoint.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    drop_metadata(folder, checkpoint.DIGEST)


def refuses(model, folder, words, error=ValueError, **arguments) -> None:
    with refused(model, words, error):
        lora.load(model, folder, **arguments)


def filled(alpha: float) -> MLP:
    """A model whose adapter has alpha everywhere in its factors too."""
    torch.manual_seed(0)
    model = MLP()
    lora.inject(model, r=2, alpha=alpha, targets=("up", "down"))
    with torch.no_grad():
        for parameter in lora.trainable_parameters(model):
            parameter.fill_(alpha)
    return model


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def peft_model(ours: gpt2.GPT2, **fields):
    """PEFT's model of the same weights, its adapter random."""
    peft = pytest.importorskip("peft", reason="PEFT is the oracle here")
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn"], "init_lora_weights": False}
    config = peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **settings | fields)
    torch.manual_seed(0)
    return peft.get_peft_model(twin(ours), config)


def in_peft(folder) -> torch.Tensor:
    """The logits of PEFT's model with an adapter of `tiny_gpt2` from a folder."""
    peft = pytest.importorskip("peft", reason="PEFT is the oracle here")
    return peft.PeftModel.from_pretrained(twin(tiny_gpt2()), folder).eval()(IDX).logits


def llama(tied: bool = False, kind: str = "LlamaForCausalLM"):
    """A tiny Llama of transformers."""
    transformers = pytest.importorskip("transformers", reason="PEFT adapts its models")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
        attention_bias=True, tie_word_embeddings=tied, pad_token_id=0,
    )  # fmt: skip
    return getattr(transformers, kind)(config).eval()
