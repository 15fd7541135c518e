"""Training on examples of real lengths: tokens a second that are no padding, by case.

On a GPU the host looks at it after the first step and after each epoch, in all of ours alike.
`--warm 1` says that torch's cache holds what is compiled.

python -m benchmarks.real_lengths --against peft
python -m benchmarks.real_lengths --against peft --device cpu --lengths E2E --data train.jsonl
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
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
EVERY = 10  # steps between two looks at the GPU where nothing is read
DEMO = gpt2.GPT2Config(n_layer=8, n_head=4, n_embd=256)  # the bundled base's size


def main() -> None:
    a = harness.arguments(
        __doc__,
        size="gpt2",
        lengths="E2E;articles",
        tokens=16_384,
        cases="",
        data=None,
        steps=30,
        warm=0,
    )
    for lengths in a.lengths.split(";"):
        median, sigma, n, size = LENGTHS[lengths]
        data = read(a.data) if a.data else drawn(median, sigma, n)
        if a.device == "cpu":
            for name, facts in in_turns(data, a.steps, bool(a.against)).items():
                harness.emit("real_lengths", a.out, case=name, lengths=lengths, **facts)
            continue
        for name, run in cases(a, data, size).items():
            if a.cases and name not in a.cases.split(";"):
                continue
            harness.free()
            try:
                facts = run()
            except Exception as error:  # a case that cannot run is a result too
                facts = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
            harness.emit("real_lengths", a.out, case=name, lengths=lengths, **facts)


def cases(a: Any, data: gpt2.Dataset, size: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured on a GPU, by name, in bfloat16; what tells most comes first."""
    budget = {"tokens_per_batch": a.tokens, "compile": True}
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "ours, packed": lambda: ours(model(a, 0.0), data, a.warm, **budget, packing=True),
        "ours, 16 x 1,024 all real": lambda: fixed(model(a), a.steps),
        "ours, buckets": lambda: ours(model(a), data, a.warm, **budget),
    }
    for grouped in (1, 50) if a.against else ():
        how = ", grouped by length" if grouped > 1 else ""
        rows = partial(padded, data, size, a.device, grouped=grouped)
        found[f"PEFT{how}"] = lambda r=rows: peft(model(a), torch.float32, r(), a.steps)
        found[f"PEFT bf16{how}"] = lambda r=rows: peft(model(a), torch.bfloat16, r(), a.steps)
    few = first(data, 20 * size)
    found["ours, padded, not compiled"] = lambda: ours(model(a), few, a.warm, batch_size=size)
    return found


def in_turns(data: gpt2.Dataset, steps: int, against: bool) -> dict[str, dict[str, Any]]:
    """On a CPU: batches of about eight examples, a step of each case in turn."""
    budget = 8 * data.n_tokens // len(data)
    network = models.ours("", "cpu", torch.float32, r=4, base_dropout=False, config=DEMO)
    ways: dict[str, dict[str, Any]] = {
        "ours, packed": {"tokens_per_batch": budget, "packing": True},
        "ours, buckets": {"tokens_per_batch": budget},
        "ours, padded": {"batch_size": 8},
    }
    rows = {name: planned(data, **way) for name, way in ways.items()}
    some = next(rows["ours, padded"])[0]
    runs: dict[str, Any] = {name: models.OurStep(network, some) for name in ways}
    if against:
        other = models.theirs(network, torch.float32)
        for name, grouped in (("PEFT", 1), ("PEFT, grouped by length", 50)):
            rows[name] = padded(data, 8, "cpu", grouped=grouped)
            runs[name] = models.PeftStep(other, some)
    seconds, tokens = dict.fromkeys(runs, 0.0), dict.fromkeys(runs, 0)
    for done in range(steps + 2):
        for name, run in runs.items():
            began = time.perf_counter()
            run.data, real = next(rows[name])
            run()
            if done >= 2:
                seconds[name] += time.perf_counter() - began
                tokens[name] += real
    return {
        name: {"real_tokens_per_s": round(tokens[name] / seconds[name]), "steps": steps}
        for name in runs
    }


def model(a: Any, attn_pdrop: float = 0.1) -> gpt2.GPT2:
    """A GPT-2 in bfloat16 with an adapter."""
    config = replace(gpt2.SIZES[a.size], attn_pdrop=attn_pdrop)
    return models.ours(a.size, a.device, torch.bfloat16, config=config)


def drawn(median: float, sigma: float, n: int) -> gpt2.Dataset:
    """Random tokens in examples of log-normal lengths."""
    random = np.random.default_rng(0)
    lengths = np.clip(np.round(random.lognormal(np.log(median), sigma, n)), 2, 1024).astype(int)
    ids = random.integers(0, 50257, int(lengths.sum()), np.int32)
    return gpt2.Dataset(ids, np.cumsum(lengths), np.zeros(n, np.int32))


def read(file: str) -> gpt2.Dataset:
    """A file's examples, of which the completions are learnt."""
    return gpt2.encode(gpt2.stream_examples(file), gpt2.Tokenizer(), answer_only=True)


def first(data: gpt2.Dataset, n: int) -> gpt2.Dataset:
    """The first examples of a data set."""
    ids, _, lengths = data.take(np.arange(min(n, len(data))))
    return gpt2.Dataset(ids.astype(np.int32), np.cumsum(lengths), np.zeros(len(lengths), np.int32))


def ours(network: gpt2.GPT2, data: gpt2.Dataset, warm: int, **config: Any) -> dict[str, Any]:
    """Two epochs: the first with all that is compiled in it, and the rate of the second."""
    options = {k: v for k, v in config.items() if k != "compile"}
    made = plan(data, **options)
    loader, epoch = timed_batches(data, made), len(made)
    run = gpt2.train(network, data, gpt2.TrainConfig(epochs=2, lr=1e-4, **config))
    begun, once, twice = (r.seconds for r in run if r.step in (1, epoch, 2 * epoch))
    later = data.n_tokens * (epoch - 1) / epoch  # in the steps of the first epoch after its first
    return {
        "real_tokens_per_s": round(data.n_tokens / (twice - once)),
        "first_epoch_from_cache_s" if warm else "first_epoch_s": round(once, 2),
        "first_step_s": round(begun, 2),
        "rate_from_second_step": round(later / (once - begun)),
        "steps": epoch,
        "ms_a_step": round((twice - once) / epoch * 1e3, 2),
        "loader_ms": round(loader * 1e3, 3),
        "loader_share": round(loader / ((twice - once) / epoch), 4),
    }


def planned(data: gpt2.Dataset, **way: Any) -> Iterator[tuple[gpt2.Batch, int]]:
    """Our batches, and their real tokens."""
    made, lengths = plan(data, **way), data.lengths
    for k in range(len(made)):
        real = int(lengths[made.examples(k, seed=0, epoch=0)].sum())
        yield batch(data, made, k, seed=0, epoch=0), real


def timed_batches(data: gpt2.Dataset, made: Any) -> float:
    """Seconds that a batch takes to make, the first ones left out."""
    times: list[float] = []
    for k in range(min(60, len(made))):
        began = time.perf_counter()
        batch(data, made, k, seed=0, epoch=0)
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def fixed(network: gpt2.GPT2, steps: int) -> dict[str, Any]:
    """The rate of one shape without padding."""
    step = models.OurStep(network, models.batch(network, 16, 1024), compile=True)
    for _ in range(3):
        step().tolist()
    began = time.perf_counter()
    for done in range(1, steps + 1):
        figures = step()
        if done % EVERY == 0 or done == steps:
            figures.tolist()
    a_step = (time.perf_counter() - began) / steps
    return {"real_tokens_per_s": round(16 * 1024 / a_step), "ms_a_step": round(a_step * 1e3, 2)}


def padded(
    data: gpt2.Dataset, size: int, device: str, *, grouped: int = 1
) -> Iterator[tuple[gpt2.Batch, int]]:
    """Batches padded to their longest, and their real tokens; of every so many sorted by length."""
    order, lengths = shuffled(np.arange(len(data)), len(data), seed=0, epoch=0), data.lengths
    for first in range(0, len(data), size * grouped):
        some = order[first : first + size * grouped]
        some = some[np.argsort(-lengths[some], kind="stable")] if grouped > 1 else some
        for start in range(0, len(some) - size + 1, size):
            chosen = some[start : start + size]
            real = int(lengths[chosen].sum())
            rows = collate(data, chosen)
            yield rows.to(torch.device(device)), real


def peft(
    network: gpt2.GPT2,
    kind: torch.dtype,
    rows: Iterator[tuple[gpt2.Batch, int]],
    steps: int,
) -> dict[str, Any]:
    """A plain loop with dynamic padding, the first three steps left out."""
    autocast = kind is torch.float32 and network.lm_head.weight.is_cuda
    step: Any = None
    began, tokens = 0.0, 0
    for done, (data, real) in enumerate(itertools.islice(rows, steps + 3)):
        step = step or models.PeftStep(models.theirs(network, kind), data, autocast=autocast)
        if done == 3:
            began, tokens = time.perf_counter(), 0
        step.data = data
        step().item()
        tokens += real
    return {"real_tokens_per_s": round(tokens / (time.perf_counter() - began))}


if __name__ == "__main__":
    main()
