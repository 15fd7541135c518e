"""Training on examples of real lengths on a GPU: tokens a second that are no padding, by case.

python -m benchmarks.real_lengths --against peft

Ours trains for two epochs; the rate is the second's, in which nothing is compiled. Packed, the base
has no dropout. The rate of one shape without padding is that of train_step, B=16 T=1024.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

import gpt2
from benchmarks import harness, models
from gpt2.data.batches import batch, collate, plan
from gpt2.data.order import shuffled

# Median and spread of log-normal lengths, how many examples, and how many a padded batch has.
LENGTHS = {"E2E": (48, 0.27, 16_000, 64), "articles": (320, 0.59, 4_000, 16)}
GROUPED = {"": 1, ", grouped by length": 50}  # batches that are sorted by length together
WARMUP, LOADED = 3, 60  # steps before the clock starts; batches that the loader is timed with

Rows = Iterator[tuple[gpt2.Batch, int]]  # batches, and their tokens that are no padding


def main() -> None:
    a = harness.arguments(
        __doc__, size="gpt2", lengths="E2E;articles", tokens=16_384, cases="", steps=30
    )
    for lengths in a.lengths.split(";"):
        median, sigma, n, size = LENGTHS[lengths]
        data = drawn(median, sigma, n)
        for name, case in cases_of(a, data, size).items():
            if not a.cases or name in a.cases.split(";"):
                harness.free()
                facts = harness.attempt(case)
                harness.emit("real_lengths", a.out, case=name, lengths=lengths, **facts)


def drawn(median: float, sigma: float, n: int) -> gpt2.Dataset:
    """Random tokens in examples of log-normal lengths."""
    random = np.random.default_rng(0)
    lengths = np.clip(np.round(random.lognormal(np.log(median), sigma, n)), 2, 1024).astype(int)
    ids = random.integers(0, 50257, int(lengths.sum()), np.int32)
    return gpt2.Dataset(ids, np.cumsum(lengths), np.zeros(n, np.int32))


def cases_of(a: Any, data: gpt2.Dataset, size: int) -> dict[str, Callable[[], harness.Facts]]:
    """What is measured, in bfloat16."""
    cases = {
        "ours, packed": partial(ours, a, data, packing=True),
        "ours, buckets": partial(ours, a, data, packing=False),
    }
    for grouping, grouped in GROUPED.items() if a.against else ():
        rows = partial(padded, data, size, a.device, grouped=grouped)
        cases[f"PEFT{grouping}"] = partial(peft, a, rows, torch.float32)
        cases[f"PEFT bf16{grouping}"] = partial(peft, a, rows, torch.bfloat16)
    return cases


def ours(a: Any, data: gpt2.Dataset, *, packing: bool) -> harness.Facts:
    """Seconds of the first epoch, with all that is compiled in it, and the rate of the second."""
    made = plan(data, tokens_per_batch=a.tokens, packing=packing)
    epoch, how = len(made), {"tokens_per_batch": a.tokens, "compile": True}
    config = gpt2.TrainConfig(epochs=2, lr=1e-4, packing=packing, **how)
    network = models.ours(a.size, a.device, torch.bfloat16, base_dropout=not packing)
    records = gpt2.train(network, data, config)
    first, both = (record.seconds for record in records if record.step % epoch == 0)
    began = time.perf_counter()
    for k in range(LOADED):
        batch(data, made, k % epoch, seed=0, epoch=1)
    loader, step = (time.perf_counter() - began) / LOADED, (both - first) / epoch
    return {
        "real_tokens_per_s": round(data.n_tokens / (both - first)),
        "first_epoch_s": round(first, 2),
        "steps": epoch,
        "ms_a_step": round(step * 1e3, 2),
        "loader_share": round(loader / step, 4),
    }


def peft(a: Any, rows: Any, dtype: torch.dtype) -> harness.Facts:
    """A plain loop with dynamic padding; float32 weights are computed with in bfloat16."""
    other = models.theirs(models.ours(a.size, a.device, torch.bfloat16), dtype)
    step: Any = None
    began, tokens = 0.0, 0
    for done, (data, real) in enumerate(itertools.islice(rows(), a.steps + WARMUP)):
        step = step or models.PeftStep(other, data, autocast=dtype is torch.float32)
        if done == WARMUP:
            began, tokens = time.perf_counter(), 0
        step.data = data
        step().item()
        tokens += real
    return {"real_tokens_per_s": round(tokens / (time.perf_counter() - began))}


def padded(data: gpt2.Dataset, size: int, device: str, *, grouped: int = 1) -> Rows:
    """Batches padded to their longest, of examples that were sorted by length within groups."""
    order, lengths = shuffled(np.arange(len(data)), len(data), seed=0, epoch=0), data.lengths
    for first in range(0, len(data), size * grouped):
        group = order[first : first + size * grouped]
        group = group[np.argsort(-lengths[group], kind="stable")] if grouped > 1 else group
        for start in range(0, len(group) - size + 1, size):
            chosen = group[start : start + size]
            rows = collate(data, chosen).to(torch.device(device))
            yield rows, int(lengths[chosen].sum())


if __name__ == "__main__":
    main()
