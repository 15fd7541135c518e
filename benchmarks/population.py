"""A step of k adapters in one batch: milliseconds by k, and what k steps of one alone take.

One row of T tokens a slot; the base has no dropout, as in searches.

    python -m benchmarks.population --against peft
    python -m benchmarks.population --slots 16 --T 1024
    python -m benchmarks.population --device cpu --size demo --slots 16
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

import gpt2
import lora
from benchmarks import harness, models
from gpt2.population.training import PopulationTraining


def main() -> None:
    a = harness.arguments(
        __doc__, size="gpt2", slots="1;8;32;64;128;256", T=32, r=8, dropout=0.0, compile=1, ticks=8
    )
    a.on_gpu, slots = a.device != "cpu", [int(k) for k in a.slots.split(";")]
    a.dtype = torch.bfloat16 if a.on_gpu else torch.float32
    a.compile = bool(a.compile and a.on_gpu)
    report(a, singles(a, max(slots)))
    for k in slots:
        harness.free()
        tick = ticks(a, k)
        peak = harness.peak_gib(tick, a.device)
        turns: dict[str, harness.Run] = {f"k={k}": tick}
        if not a.on_gpu:
            step = singles(a, k)["alone"]
            turns[f"{k} alone"] = lambda k=k, step=step: [step() for _ in range(k * a.ticks)]
        report(a, turns, each=a.ticks, peak_gib=peak)


def singles(a: Any, most: int) -> dict[str, harness.Run]:
    """Steps of one adapter: of one row, of as many as the most slots have, and PEFT's of one."""
    alone = models.ours(a.size, a.device, a.dtype, r=a.r, dropout=a.dropout, base_dropout=False)
    one, rows = (models.batch(alone, B, a.T) for B in (1, most))
    runs: dict[str, harness.Run] = {
        "alone": models.OurStep(alone, one),
        f"one adapter, {most} rows": models.OurStep(alone, rows, compile=a.compile),
    }
    if a.against:
        mode = "reduce-overhead" if a.on_gpu else None
        name = f"PEFT compiled, {mode}" if mode else "PEFT"
        runs[name] = models.PeftStep(models.theirs(alone, a.dtype), one, mode=mode)
    return runs


def ticks(a: Any, k: int) -> Callable[[], Any]:
    """Several steps of k adapters, after which the host looks at the device."""
    model = models.base(a.size, a.device, a.dtype, dropout=False)
    adapter = lora.LoRAConfig(r=a.r, alpha=16, dropout=a.dropout)
    slots = lora.Population(model, k, adapter)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, a.T * 1000, np.int32)
    data = gpt2.Dataset(ids, np.arange(1, 1001) * a.T, np.zeros(1000, np.int32))
    config = gpt2.TrainConfig(steps=10**6, lr=1e-4, compile=a.compile)
    run = PopulationTraining(model, slots, data, config)
    for i in range(k):
        slots.draw(i, dataclasses.replace(adapter, seed=i))
        run.start(i, dataclasses.replace(config, seed=i, lr=1e-4 * (1 + i % 7)))
    return lambda: run.advance(a.ticks)


def report(a: Any, runs: Mapping[str, harness.Run], each: int = 1, **facts: Any) -> None:
    """Time the runs in turns; milliseconds a step."""
    for run in runs.values():
        for _ in range(3):
            run()
    for name, time in harness.interleaved(runs, a.repeats, a.device).items():
        ms = {key: round(value / each, 3) for key, value in time.items()}
        harness.emit("population", a.out, case=name, size=a.size, T=a.T, ms=ms, **facts)


if __name__ == "__main__":
    main()
