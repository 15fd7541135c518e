"""Tiny random models of transformers' architectures: inject, train, merge, disable, eject.

By default every n-th runs; `ARCHITECTURES=all pytest tests/test_architectures.py` runs all.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn

import lora
from tests.toys import randomize, raw

transformers = pytest.importorskip("transformers")
modeling_auto = pytest.importorskip("transformers.models.auto.modeling_auto")

# What each config is given of this, if it knows the word.
SIZES = {
    "hidden_size": 16, "d_model": 16, "n_embd": 16, "dim": 16, "embed_dim": 16,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 1,
    "decoder_layers": 1, "num_decoder_layers": 1, "num_attention_heads": 2, "n_head": 2,
    "n_heads": 2, "num_heads": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "d_kv": 8, "d_ff": 24, "intermediate_size": 24,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "ffn_dim": 24, "hidden_dim": 24, "n_inner": 24,
    "d_inner": 24, "ffn_hidden_size": 24, "vocab_size": 40, "max_position_embeddings": 64,
    "n_positions": 64, "embedding_size": 16, "moe_intermediate_size": 12, "num_experts": 2,
    "num_local_experts": 2, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1,
    "topk_group": 1, "shared_expert_intermediate_size": 12, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "image_size": 16, "patch_size": 8,
    "type_vocab_size": 2, "num_mel_bins": 16, "max_source_positions": 20,
    "max_target_positions": 40, "attention_hidden_size": 16, "state_size": 4, "expand": 2,
    "time_step_rank": 2, "context_length": 32, "rotary_dim": 4, "entity_vocab_size": 10,
    "hidden_sizes": [8, 16], "depths": [1, 1], "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
OF_AUDIO = {
    "conv_dim": [8] * 7, "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8,
}  # fmt: skip

NAMES = {
    "causal": """afmoe apertus arcee aria_text bart beam bert bert-generation big_bird
        bigbird_pegasus biogpt bitnet blenderbot blenderbot-small bloom camembert cohere cohere2
        cwm data2vec-text deepseek_v2 doge electra ernie ernie4_5 ernie4_5_moe exaone4
        falcon_mamba flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe gpt-sw3 gpt2 gpt_bigcode
        gpt_neox gpt_neox_japanese gpt_oss gptj granite granitemoe granitemoeshared helium
        hunyuan_v1_dense hunyuan_v1_moe jetmoe lfm2 llama llama4_text mamba marian mbart
        megatron-bert minimax ministral mistral mixtral modernbert-decoder moshi mpt mvp nanochat
        nemotron olmo olmo2 olmo3 olmoe openai-gpt opt pegasus persimmon phi phi3 phimoe plbart
        qwen2 qwen2_moe qwen3 qwen3_moe rembert roberta roberta-prelayernorm roformer rwkv
        seed_oss smollm3 solar_open stablelm starcoder2 trocr vaultgemma whisper xglm xlm
        xlm-roberta xlm-roberta-xl""",
    "seq2seq": """led longt5 m2m_100 mt5 nllb-moe pegasus_x seamless_m4t seamless_m4t_v2
        switch_transformers t5 umt5""",
    "masked": """albert convbert deberta deberta-v2 distilbert esm eurobert flaubert fnet ibert
        layoutlm longformer luke mobilebert modernbert mpnet mra nomic_bert nystromformer
        squeezebert tapas yoso""",
    "image": """beit convnext convnextv2 data2vec-vision deit dinov2 dinov2_with_registers
        focalnet ijepa regnet resnet vit vit_msn""",
    "audio": """data2vec-audio hubert sew unispeech unispeech-sat wav2vec2 wav2vec2-conformer
        wavlm""",
}
CLASSES = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
}
KNOWN = [(kind, name) for kind, names in NAMES.items() for name in names.split()]
# Those that read a layer's weight, tie or subclass in ways of their own always run.
ALWAYS = {"t5", "mt5", "umt5", "longt5", "switch_transformers", "rwkv", "gemma3_text", "bart",
          "m2m_100", "gpt2", "llama", "bert", "vit", "wav2vec2", "albert", "mamba"}  # fmt: skip
EVERY = 1 if os.environ.get("ARCHITECTURES") == "all" else 6
CHOSEN = [pair for i, pair in enumerate(KNOWN) if pair[1] in ALWAYS or i % EVERY == 0]
TRAINS_IN_TRAINING_MODE = {"rwkv"}  # in eval mode its own code changes what backward needs
REFUSED = {"mobilebert": "r 1 is above 0, its smaller side"}  # a layer without inputs, at this size
"""Architectures that are refused, each with what the message says."""


def tiny(kind: str, name: str) -> nn.Module:
    """A model of this architecture with random weights, in eval mode; skipped if too new."""
    classes = getattr(modeling_auto, CLASSES[kind])
    if name not in classes:
        pytest.skip(f"this version of transformers has no {name}")
    known = transformers.AutoConfig.for_model(name)
    words = getattr(type(known), "attribute_map", {})
    wanted = {**SIZES, **(OF_AUDIO if kind == "audio" else {})}
    sizes = {k: v for k, v in wanted.items() if hasattr(known, k) or k in words}
    found = classes[name]
    model = getattr(transformers, found if isinstance(found, str) else found[0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model(type(known)(**sizes)).eval()


def inputs_of(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if kind == "image":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if kind == "audio":
        return {"input_values": torch.randn(2, 800, generator=generator)}
    ids = torch.randint(3, 40, (2, 6), generator=generator)
    return {"input_ids": ids, "decoder_input_ids": ids} if kind == "seq2seq" else {"input_ids": ids}


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)  # some draw numbers in eval mode too
    found = model(**inputs)
    return found.logits if hasattr(found, "logits") else found[0]


@pytest.mark.parametrize(("kind", "name"), CHOSEN, ids=[name for _, name in CHOSEN])
def test_an_architecture_is_injected_trained_merged_disabled_and_ejected(kind, name):
    model, inputs = tiny(kind, name), inputs_of(kind)
    before = {key: raw(value) for key, value in model.state_dict().items()}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        base = output(model, inputs)
        # torch multiplies a strided input by a frozen matrix in another order of sums.
        model.requires_grad_(False)
        frozen = output(model, inputs)
        for n, p in model.named_parameters():
            p.requires_grad_(n in trainable)
        torch.testing.assert_close(frozen, base, rtol=1e-4, atol=1e-5)
    if name in REFUSED:
        with pytest.raises((ValueError, RuntimeError), match=REFUSED[name]) as refusal:
            lora.inject(model, targets="all-linear", r=1, seed=0)
        assert "\n" not in str(refusal.value)
        assert {key: raw(value) for key, value in model.state_dict().items()} == before
        return
    paths = lora.inject(model, targets="all-linear", r=1, seed=0)
    with torch.no_grad():
        torch.testing.assert_close(output(model, inputs), base, rtol=1e-4, atol=1e-5)  # at birth
    randomize(model, std=0.1)
    model.train(name in TRAINS_IN_TRAINING_MODE)
    output(model, inputs).float().square().mean().backward()
    model.eval()
    trained = [p for p in lora.trainable_parameters(model) if p.grad is not None]
    assert trained
    assert all(torch.isfinite(p.grad).all() for p in trained)
    torch.optim.SGD(trained, 1e-2).step()
    with torch.no_grad():
        adapted = output(model, inputs)
        assert not torch.equal(adapted, base)
        lora.merge(model)
        size = max(1.0, float(adapted.abs().max()))
        torch.testing.assert_close(output(model, inputs), adapted, rtol=1e-3, atol=1e-4 * size)
        with lora.disabled(model):
            assert raw(output(model, inputs)) == raw(frozen)
        lora.unmerge(model)
        assert raw(output(model, inputs)) == raw(adapted)
        with lora.disabled(model):
            assert raw(output(model, inputs)) == raw(frozen)
    assert lora.eject(model) == paths
    with torch.no_grad():
        assert raw(output(model, inputs)) == raw(base)
    assert {key: raw(value) for key, value in model.state_dict().items()} == before
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
