"""Where the time of a compiled training step goes on a GPU: its kernels by what they are for.

python -m benchmarks.kernels --B 16 --T 1024
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness, models

STEPS = 3
KINDS = {  # the first kind of which a kernel's name holds a word
    "attention": ("sdpa", "flash", "compute_dot_do_o", "convert_dq"),
    "matrix products": ("nvjet", "gemm", "cutlass", "splitK"),
    "softmax and loss of the head": ("prepare_softmax", "log_", "masked_fill"),
    "LayerNorm, dropout, residual sums": ("layer_norm",),
    "GELU": ("gelu",),
    "copies of q, k and v": ("stack",),
}


def main() -> None:
    a = harness.arguments(__doc__, B=16, T=1024, size="gpt2", targets="c_attn", r=8, warmup=3)
    if a.device == "cpu":
        raise SystemExit("benchmarks.kernels needs a GPU.")
    model = models.ours(a.size, a.device, torch.bfloat16, targets=a.targets, r=a.r)
    step = models.OurStep(model, models.batch(model, a.B, a.T), compile=True)
    for _ in range(a.warmup):
        step()
    for name, (ms, count) in by_kind(step).items():
        harness.emit(
            "kernels",
            a.out,
            case=name,
            B=a.B,
            T=a.T,
            size=a.size,
            targets=a.targets,
            kernel_ms=round(ms, 3),
            kernels=round(count),
        )


def by_kind(step: Callable[[], Any]) -> dict[str, tuple[float, float]]:
    """Milliseconds and number of kernels a step, the most expensive kind first."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    ms, count = Counter[str](), Counter[str]()
    for event in profiled.key_averages():
        if event.device_type.name != "CUDA" or "#" in event.key:
            continue
        kind = next((k for k, words in KINDS.items() if any(w in event.key for w in words)), "rest")
        ms[kind] += event.self_device_time_total / 1e3 / STEPS
        count[kind] += event.count / STEPS
    return {kind: (took, count[kind]) for kind, took in ms.most_common()}


if __name__ == "__main__":
    main()
