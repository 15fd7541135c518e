"""What it costs to keep a run's state: one snapshot of GPT-2 with an adapter on c_attn.

python -m benchmarks.snapshot
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

import gpt2
from benchmarks import harness, models
from gpt2.training.snapshots import NAME, Snapshot, write


def main() -> None:
    a = harness.arguments(__doc__, size="gpt2", r=8, folder=None)
    model = models.ours(a.size, a.device, torch.float32, r=a.r)
    data = gpt2.encode(["A short text to take a step on."] * 4, gpt2.Tokenizer())
    run = gpt2.train(model, data, gpt2.TrainConfig(steps=3, lr=1e-4))
    next(run)
    state = run.state()
    cases = {
        "no best adapter yet": {},
        "a best adapter beside": {n: p.clone() for n, p in state.parameters.items()},
    }
    with tempfile.TemporaryDirectory(dir=a.folder) as place:
        for case, best in cases.items():
            folder = Path(place) / case.replace(" ", "-")
            folder.mkdir()
            snapshot = Snapshot({}, state, None, {}, best)
            write(folder, snapshot)
            seconds: list[float] = []
            for _ in range(a.repeats):
                began = time.perf_counter()
                write(folder, snapshot)
                seconds.append((time.perf_counter() - began) * 1e3)
            ms = harness.spread(seconds)
            megabytes = (folder / NAME).stat().st_size / 1e6
            facts = {"r": a.r, "size": a.size, "device": a.device, "ms": ms}
            facts |= {"megabytes": round(megabytes, 2), "share": round(ms["median"] / 1e3, 5)}
            harness.emit("snapshot", a.out, case=f"{case}, {a.device}", **facts)


if __name__ == "__main__":
    main()
