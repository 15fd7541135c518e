"""One forward pass of rows under many adapters, against rows under one.

python -m benchmarks.routing --B 32 --T 64 --adapters 16 --against peft
"""

from __future__ import annotations

import copy

import torch

import lora
from benchmarks import harness, models


def main() -> None:
    a = harness.arguments(__doc__, B=8, T=32, adapters=8, size="gpt2")
    dtype = torch.bfloat16 if a.device != "cpu" else torch.float32
    model = models.ours(a.size, a.device, dtype, dropout=0.0)
    names = ["default", *(f"task{i}" for i in range(1, a.adapters))]
    for seed, name in enumerate(names[1:], 1):
        lora.inject(model, r=8, alpha=16, targets=models.TARGETS["c_attn"], adapter=name, seed=seed)
    lora.activate(model, "default")
    model.requires_grad_(False)
    idx = models.batch(model, a.B, a.T).idx
    rows = [names[b % len(names)] for b in range(a.B)]

    mixed = copy.deepcopy(model)
    runs: dict[str, harness.Run] = {
        "ours, one adapter": lambda: model(idx),
        f"ours, {a.adapters} adapters mixed": lambda: mixed(idx),
    }
    if a.against:
        other = models.theirs(model, dtype)
        for name in names[1:]:
            other.add_adapter(name, copy.deepcopy(other.peft_config["default"]))
        other.eval()
        runs["PEFT, one adapter"] = lambda: other(input_ids=idx)
        runs[f"PEFT, {a.adapters} adapters mixed"] = lambda: other(
            input_ids=idx, adapter_names=rows
        )
    with torch.no_grad(), lora.routed(mixed, rows):
        for case in runs.values():
            for _ in range(3):
                case()
        times = harness.interleaved(runs, a.repeats, a.device)
    for name, ms in times.items():
        one = times[f"{name.partition(',')[0]}, one adapter"]
        facts = {"ms": ms, "against_one": round(ms["median"] / one["median"], 3)}
        harness.emit("routing", a.out, case=name, B=a.B, T=a.T, size=a.size, **facts)


if __name__ == "__main__":
    main()
