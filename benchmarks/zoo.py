"""Adapters on small random models of transformers' architectures, here and in PEFT: a table.

    python -m benchmarks.zoo > docs/zoo.md

Each model takes its attention's usual targets and then `"all-linear"`.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any, cast

import peft
import torch
import transformers
from torch import Tensor, nn

import lora
from benchmarks import harness

HEADING = """# Architectures

[Other models](other-models.md) says what is measured."""
ZOO = {
    "CausalLM": """gpt2 gpt_neox gptj gpt_bigcode opt bloom falcon llama mistral mixtral qwen2
        qwen3 gemma gemma2 gemma3_text phi phi3 olmo2 starcoder2 stablelm""",
    "MaskedLM": """bert roberta distilbert albert electra deberta deberta-v2 mpnet xlm-roberta
        camembert modernbert esm""",
    "ImageClassification": "vit deit dinov2 beit vit_msn",
}
SIZES = dict[str, Any]()  # what each config is given, if it knows the word
SIZES |= dict.fromkeys("hidden_size n_embd dim embedding_size word_embed_proj_dim".split(), 16)
SIZES |= dict.fromkeys("num_hidden_layers n_layer n_layers num_local_experts".split(), 2)
SIZES |= dict.fromkeys("num_attention_heads n_head n_heads eos_token_id".split(), 2)
SIZES |= dict.fromkeys("intermediate_size ffn_dim hidden_dim n_inner".split(), 24)
SIZES |= {"num_key_value_heads": 1, "head_dim": 8, "rotary_dim": 4, "vocab_size": 40}
SIZES |= {"max_position_embeddings": 64, "n_positions": 64, "pad_token_id": 0, "bos_token_id": 1}
SIZES |= {"image_size": 16, "patch_size": 8}
# Targets: the first of these whose words are all there.
USUAL = """c_attn, query_key_value, qkv_proj, Wqkv, q_proj v_proj, query value, q_lin v_lin, q v,
    query_proj value_proj, in_proj"""
COLUMNS = "model, targets, birth, 20 steps, reload, in PEFT, from PEFT, merged, ejected".split(", ")


def tiny(kind: str, name: str) -> nn.Module:
    """A model of this architecture with random weights, in eval mode."""
    config = transformers.AutoConfig.for_model(name)
    words = {*dir(config), *getattr(type(config), "attribute_map", {})}
    fixed = {word for word in SIZES if isinstance(getattr(type(config), word, None), property)}
    sizes = {word: size for word, size in SIZES.items() if word in words - fixed}
    torch.manual_seed(0)
    made = type(config)(**sizes, architectures=[])
    return getattr(transformers, f"AutoModelFor{kind}").from_config(made).eval()


def measured(kind: str, name: str, targets: Any) -> list[str]:
    """The cells of a row; one alone says why the targets are refused."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (2, 6), generator=draw)
    given = ids if kind.endswith("LM") else torch.randn(2, 3, 16, 16, generator=draw)

    def of(model: Any) -> Tensor:
        return model(given).logits.detach()

    def differs(one: Tensor, other: Tensor) -> str:
        return f"{float((one - other).abs().max() / other.abs().max()):.0e}".replace("0e+00", "0")

    model: Any = tiny(kind, name).requires_grad_(False)
    base = of(model)
    try:
        lora.inject(model, targets=targets, r=2, seed=0)
    except (ValueError, RuntimeError) as error:
        return [f"refused: {error}"]
    cells = [differs(of(model), base)]
    optimizer = torch.optim.AdamW(lora.trainable_parameters(model), lr=3e-3)
    losses: list[float] = []
    for _ in range(20):
        loss = (model(given).logits - base.roll(1, 0)).square().mean()
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    cells.append(f"{losses[-1] / losses[0] - 1:+.0%}")
    adapted = of(model)
    with tempfile.TemporaryDirectory() as folder:
        lora.save(model, f"{folder}/ours")
        lora.load(again := tiny(kind, name), f"{folder}/ours")
        cells.append(differs(of(again), adapted))
        theirs = peft.PeftModel.from_pretrained(cast(Any, tiny(kind, name)), f"{folder}/ours")
        cells.append(differs(of(theirs), adapted))
        theirs.save_pretrained(f"{folder}/theirs")
        lora.load(back := tiny(kind, name), f"{folder}/theirs")
        cells.append(differs(of(back), of(theirs)))
    with lora.merged(model):
        cells.append(differs(of(model), adapted))
    lora.eject(model)
    return [*cells, differs(of(model), base)]


def rows(names: Sequence[str] = ()) -> list[list[str]]:
    """The cells of all models, or of these."""
    table: list[list[str]] = []
    for kind, known in ZOO.items():
        for name in known.split() if not names else sorted({*names} & {*known.split()}):
            there = {path.rpartition(".")[2] for path, _ in tiny(kind, name).named_modules()}
            usual = next(u.split() for u in USUAL.split(",") if there.issuperset(u.split()))
            for targets in (tuple(usual), "all-linear"):
                shown = "all-linear" if targets == "all-linear" else ", ".join(usual)
                table.append([name, f"`{shown}`", *measured(kind, name, targets)])
    return table


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    made = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, transformers, peft))
    print(f"{HEADING}\nMade by `python -m benchmarks.zoo` at {harness.commit()}: {made}.\n")
    for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows()):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
