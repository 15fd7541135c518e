"""How speed and memory of our training step grow with batch, length, rank or model size.

python -m benchmarks.growth --axis T
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import harness, models

GPU: dict[str, list[Any]] = {
    "B": [1, 4, 16, 64],
    "T": [64, 256, 1024],
    "r": [1, 8, 64],
    "size": ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"],
}
CPU: dict[str, list[Any]] = {"B": [1, 2, 4], "T": [16, 64, 256], "r": [1, 8, 64], "size": ["gpt2"]}


def main() -> None:
    a = harness.arguments(__doc__, axis="B", warmup=3)
    on_gpu = a.device != "cpu"
    usual: dict[str, Any] = {"B": 16, "T": 1024, "r": 8, "size": "gpt2"}
    if not on_gpu:
        usual |= {"B": 1, "T": 64}
    elif a.axis == "size":
        usual |= {"B": 8}
    dtype = torch.bfloat16 if on_gpu else torch.float32
    for value in (GPU if on_gpu else CPU)[a.axis]:
        case = usual | {a.axis: value}
        model = models.ours(case["size"], a.device, dtype, r=case["r"])
        step = models.OurStep(model, models.batch(model, case["B"], case["T"]), compile=on_gpu)
        for _ in range(a.warmup):
            step()
        step.forget()
        peak = harness.peak_gib(step, a.device)
        ms = harness.interleaved({"ours": step}, a.repeats, a.device)["ours"]
        del model, step
        harness.free()
        harness.emit(
            "growth",
            a.out,
            case="ours",
            axis=a.axis,
            **case,
            ms=ms,
            tokens_per_s=round(case["B"] * case["T"] / ms["median"] * 1e3),
            peak_gib=peak,
        )


if __name__ == "__main__":
    main()
