"""Where the time of a compiled training step goes on a GPU: its kernels by what they are for.

python -m benchmarks.kernels --B 16 --T 1024
python -m benchmarks.kernels --packed E2E --context 256 --top 25
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import gpt2
from benchmarks import harness, models, real_lengths

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
    a = harness.arguments(
        __doc__,
        B=16,
        T=1024,
        size="gpt2",
        targets="c_attn",
        r=8,
        warmup=3,
        packed="",  # lengths of documents that lie end to end in a row of B·T tokens
        context=0,  # the model's, if not its own: no document is longer
        top=0,  # kernels to print by name
    )
    if a.device == "cpu":
        raise SystemExit("benchmarks.kernels needs a GPU.")
    config = gpt2.SIZES[a.size]
    config = dataclasses.replace(config, block_size=a.context or config.block_size)
    if a.packed:
        config = dataclasses.replace(config, attn_pdrop=0.0)
    model = models.ours(a.size, a.device, torch.bfloat16, targets=a.targets, r=a.r, config=config)
    work: dict[str, Any] = {"B": a.B, "T": a.T, "size": a.size, "targets": a.targets}
    data, how = models.batch(model, a.B, min(a.T, config.block_size)), {}
    if a.packed:
        median, sigma, n, _ = real_lengths.LENGTHS[a.packed]
        budget = {"tokens_per_batch": a.B * a.T, "packing": True}
        examples = real_lengths.drawn(median, sigma, n)
        data, _ = next(real_lengths.planned(examples, **budget))
        data, how = data.to(torch.device(a.device)), budget
        work |= {"packed": a.packed, "context": config.block_size}
    step = models.OurStep(model, data, compile=True, **how)
    for _ in range(a.warmup):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        step()
    torch.cuda.synchronize()
    whole = (time.perf_counter() - began) / 20 * 1e3
    kinds = by_kind(step, a.top)
    harness.emit("kernels", a.out, case="whole step", **work, kernel_ms=round(whole, 3))
    for name, (ms, count) in kinds.items():
        facts = {"kernel_ms": round(ms, 3), "kernels": round(count)}
        harness.emit("kernels", a.out, case=name, **work, **facts)


def by_kind(step: Callable[[], Any], top: int = 0) -> dict[str, tuple[float, float]]:
    """Milliseconds and number of kernels a step, the most expensive kind first."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    if top:
        print(profiled.key_averages().table(sort_by="cuda_time_total", row_limit=top))
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
