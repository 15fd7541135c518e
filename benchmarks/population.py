"""A step of k adapters in one batch: milliseconds by k, and what k steps of one alone take.

One row of T tokens a slot; the base has no dropout, as in searches.

    python -m benchmarks.population --against peft
    python -m benchmarks.population --slots 16 --T 1024
    python -m benchmarks.population --device cpu --size demo --slots 16
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import gpt2
import lora
from benchmarks import harness, models
from gpt2.population.training import PopulationTraining

DEMO = gpt2.GPT2Config(n_layer=8, n_head=4, n_embd=256)  # the bundled base's size


def main() -> None:
    a = harness.arguments(
        __doc__, size="gpt2", slots="1;8;32;64;128;256", T=32, r=8, dropout=0.0, compile=1, ticks=8
    )
    on_gpu = a.device != "cpu"
    a.dtype = torch.bfloat16 if on_gpu else torch.float32
    a.config = DEMO if a.size == "demo" else gpt2.SIZES[a.size]
    alone = models.ours("", a.device, a.dtype, r=a.r, dropout=a.dropout, config=dry(a.config))
    one, tokens = (models.batch(alone, B, a.T) for B in (1, largest(a)))
    compiling = {"compile": bool(a.compile and on_gpu)}
    runs: dict[str, Callable[[], Any]] = {
        "alone": models.OurStep(alone, one),
        f"one adapter, {largest(a)} rows": models.OurStep(alone, tokens, **compiling),
    }
    if a.against:
        other = models.theirs(alone, a.dtype)
        mode = "reduce-overhead" if on_gpu else None
        runs["PEFT compiled" if on_gpu else "PEFT"] = models.PeftStep(other, one, mode=mode)
    report(a, runs)
    step = None if on_gpu else runs["alone"]
    del runs, alone
    for k in map(int, a.slots.split(";")):
        harness.free()
        tick = ticks(a, k, **compiling)
        facts = {"peak_gib": harness.peak_gib(tick, a.device), **busy(a, tick)} if on_gpu else {}
        turns: dict[str, Callable[[], Any]] = {f"k={k}": tick}
        if step is not None:
            turns[f"{k} alone"] = functools.partial(again, step, k * a.ticks)
        report(a, turns, each=a.ticks, **facts)


def again(step: Callable[[], Any], times: int) -> None:
    """So many steps, one after the other."""
    for _ in range(times):
        step()


def largest(a: Any) -> int:
    """The most slots."""
    return max(map(int, a.slots.split(";")))


def dry(config: gpt2.GPT2Config) -> gpt2.GPT2Config:
    """Without dropout."""
    return dataclasses.replace(config, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)


def ticks(a: Any, k: int, **config: Any) -> Callable[[], Any]:
    """Several steps of k adapters, after which the host looks at the device."""
    with torch.device(a.device):
        model = gpt2.GPT2(dry(a.config)).to(a.dtype)
    adapter = lora.LoRAConfig(r=a.r, alpha=16, dropout=a.dropout)
    slots = lora.Population(model, k, adapter)
    random = np.random.default_rng(0)
    ids = random.integers(0, a.config.vocab_size, a.T * 1000, np.int32)
    ends = np.arange(1, 1001) * a.T
    data = gpt2.Dataset(ids, ends, np.zeros(1000, np.int32))
    training = gpt2.TrainConfig(steps=10**6, lr=1e-4, **config)
    run = PopulationTraining(model, slots, data, training)
    for i in range(k):
        slots.draw(i, dataclasses.replace(adapter, seed=i))
        run.start(i, dataclasses.replace(training, seed=i, lr=1e-4 * (1 + i % 7)))
    return lambda: run.advance(a.ticks)


def report(a: Any, runs: dict[str, Callable[[], Any]], each: int = 1, **facts: Any) -> None:
    """Time the runs in turns; milliseconds a step."""
    for run in runs.values():
        for _ in range(3):
            run()
    for name, time in harness.interleaved(runs, a.repeats, a.device).items():
        ms = {key: round(value / each, 3) for key, value in time.items()}
        harness.emit("population", a.out, size=a.size, case=name, T=a.T, ms=ms, **facts)


def busy(a: Any, tick: Callable[[], Any]) -> dict[str, Any]:
    """How long the GPU works for a step, whatever the host takes, and with how many kernels."""
    for _ in range(3):
        tick()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        tick()
        torch.cuda.synchronize()
    kernels = [e for e in found.events() or () if e.device_type.name == "CUDA"]
    total = sum(e.device_time_total for e in kernels) / a.ticks / 1e3
    return {"gpu_ms": round(total, 3), "kernels": round(len(kernels) / a.ticks)}


if __name__ == "__main__":
    main()
