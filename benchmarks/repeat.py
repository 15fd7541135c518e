"""Do two runs of one seed give the same bits? By way to step; on a GPU attention's may not.

A way whose runs differ is run twice more under `torch.use_deterministic_algorithms`, which makes
them equal, or names what has no deterministic form.

python -m benchmarks.repeat
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch

import gpt2
import lora
from benchmarks import harness, models, real_lengths

CONFIG = gpt2.GPT2Config(n_layer=2, n_head=4, n_embd=256)
DRY = dataclasses.replace(CONFIG, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
PACKED = {"tokens_per_batch": 2048, "packing": True}
PADDED = {"batch_size": 16}
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WAYS = {
    "one by one": {"cuda_graph": False},
    "CUDA graphs": {},
    "compiled": {"compile": True, "cuda_graph": False},
}


def main() -> None:
    a = harness.arguments(__doc__, steps=20)
    for case, (config, dtype, how) in cases(a.device).items():
        runs = [run(a, config, dtype, how) for _ in range(2)]
        where = parting(*runs)
        facts: dict[str, Any] = {"equal": not where, "where": where}
        if where:
            facts |= under_determinism(a, config, dtype, how)
        harness.emit("repeat", a.out, case=case, device=a.device, **facts)
        harness.free()


def cases(device: str) -> dict[str, Any]:
    """Model, dtype and options by name."""
    found: dict[str, Any] = {}
    for kind, dtype in KINDS.items():
        for way, options in WAYS.items():
            if way != "compiled":  # each of its shapes takes a while
                found[f"padded, {kind}, {way}"] = (CONFIG, dtype, {**PADDED, **options})
            found[f"packed, {kind}, {way}"] = (DRY, dtype, {**PACKED, **options})
    if device == "cpu":  # it has no graphs, and compiles for minutes
        found = {name: case for name, case in found.items() if "one by one" in name}
    return found


def run(
    a: Any, config: gpt2.GPT2Config, dtype: torch.dtype, how: dict[str, Any]
) -> list[tuple[Any, ...]]:
    """Loss and gradient norm of each step, and last the weights."""
    torch.manual_seed(0)
    model = models.ours("", a.device, dtype, config=config)
    data = real_lengths.drawn(48, 0.5, 400)
    records = gpt2.train(model, data, gpt2.TrainConfig(steps=a.steps, lr=1e-2, **how))
    figures: list[tuple[Any, ...]] = [(r.loss, r.grad_norm) for r in records]
    weights = torch.cat([p.detach().flatten() for p in lora.trainable_parameters(model)])
    return [*figures, (weights.double().sum().item(), weights.double().square().sum().item())]


def parting(one: list[tuple[Any, ...]], other: list[tuple[Any, ...]]) -> str:
    """Where two runs first differ, "" for nowhere."""
    for step, (mine, theirs) in enumerate(zip(one, other, strict=True), 1):
        if mine != theirs:
            what = "loss" if mine[0] != theirs[0] else "gradient's norm"
            return f"step {step}, {what}" if step < len(one) else "the weights alone"
    return ""


def under_determinism(
    a: Any, config: gpt2.GPT2Config, dtype: torch.dtype, how: dict[str, Any]
) -> dict[str, Any]:
    """Whether two runs are equal then, and the parts that torch says it cannot make so."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            runs = [run(a, config, dtype, how) for _ in range(2)]
    except Exception as error:
        return {"deterministic": f"{type(error).__name__}: {str(error)[:200]}"}
    finally:
        torch.use_deterministic_algorithms(False)
    said = {str(w.message).split(".")[0][:120] for w in caught if "determinis" in str(w.message)}
    return {"deterministic": parting(*runs) or "equal", "named": sorted(said)[:5]}


if __name__ == "__main__":
    main()
