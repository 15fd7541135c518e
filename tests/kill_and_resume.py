"""Kill a run at random instants, in a save too, until it ends; it must equal one never killed.

    python -m tests.kill_and_resume --kills 200 [--device cuda] [--seed 0] [--graphs]

With `--graphs` a step has one micro-batch, which a GPU then replays as a CUDA graph.
Compared to the bit: every step's loss and gradient norm, the last weights, AdamW's moments, the
best weights and their step, all evaluations. A run that goes on from the weights alone must differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.tensor  # here once, not in the first step of every child

import gpt2
from benchmarks import harness
from gpt2.training import snapshots
from tests.runs import DATA, HELD_OUT, digest, model_of

STEPS = 24
CONFIG = gpt2.TrainConfig(lr=3e-2, steps=STEPS, batch_size=3, accumulate=2)
GRAPHED = replace(CONFIG, accumulate=1)
PART = snapshots.PART


def child(place: Path, device: str, config: gpt2.TrainConfig = CONFIG) -> None:
    """Train, from the snapshot if there is one; write each record, and what came out."""
    torch.set_num_threads(1)
    model = model_of(dropout=True, adapter=True).to(device)
    run = gpt2.RunConfig(eval_every=5, patience=6, save_every=1, folder=place)
    resume = (place / snapshots.NAME).exists()
    fit = gpt2.fit(model, DATA, config, validation=HELD_OUT, run=run, resume=resume)
    (place / PART).unlink(missing_ok=True)  # so that the next one is this process's
    metrics = place / "metrics"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    (place / "metrics.part").write_text("".join(lines[: fit.start - 1]))
    os.replace(place / "metrics.part", metrics)
    (place / "begun").touch()
    began = time.monotonic()
    with metrics.open("a", buffering=1) as file:
        for record in fit:
            file.write(json.dumps(record.metrics() | {"seconds": 0}) + "\n")
    (place / "outcome").write_text(json.dumps(outcome(fit)))
    (place / "seconds").write_text(str(time.monotonic() - began))


def outcome(fit: gpt2.Fit) -> dict[str, object]:
    """All that must be equal, in short."""
    with fit.last_weights():
        state = fit.state()
        found = {"last": digest(state.parameters), "moments": digest(state.moments)}
    with fit.best_weights():
        best = digest(fit.state().parameters)
    return {**found, "best": best, "best_step": fit.best_step, "evaluated": str(fit.evaluated)}


def start(place: Path, device: str, config: gpt2.TrainConfig = CONFIG) -> int:
    """A child, forked, which takes no time: nothing here has touched a GPU yet."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        child(place, device, config)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, place: Path, seconds: float | None, in_save: bool = False) -> int | None:
    """Kill it some seconds after its training began; its exit code, None if it was killed.

    Or else in the save that comes next.
    """
    if seconds is not None:
        while not (place / "begun").exists():
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break  # it failed before
            time.sleep(0.002)
        (place / "begun").unlink(missing_ok=True)
        time.sleep(seconds)
        patience = time.monotonic() + 1
        while in_save and not (place / PART).exists() and time.monotonic() < patience:
            pass
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else None


def told(place: Path) -> tuple[str, str]:
    """What a finished run left."""
    return (place / "metrics").read_text(), (place / "outcome").read_text()


def main() -> None:
    """Count the kills, and raise at the first difference."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--graphs", action="store_true", help="one micro-batch a step")
    parser.add_argument("--out", help="file to append what was found to")
    options = parser.parse_args()
    config = GRAPHED if options.graphs else CONFIG
    draw, place = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="kill-"))
    for name in ("whole", "twin"):
        (place / name).mkdir()
        began = time.monotonic()
        assert wait(start(place / name, options.device, config), place / name, None) == 0
        took = time.monotonic() - began
    whole = place / "whole"
    want, took = told(whole), min(took, float((whole / "seconds").read_text()))
    assert told(place / "twin") == want, "two runs that were never killed differ"
    kills = in_save = rounds = 0
    while kills < options.kills:
        rounds += 1
        cut = place / str(rounds)
        cut.mkdir()
        while True:
            due = draw.uniform(0, took) if kills < options.kills else None
            code = wait(start(cut, options.device, config), cut, due, draw.random() < 0.5)
            if code is not None:
                break
            kills += 1
            in_save += (cut / PART).exists()
        assert code == 0, f"round {rounds}: exit code {code}"
        assert told(cut) == want, f"round {rounds} differs: see {cut} and {whole}"
        shutil.rmtree(cut)
    shutil.rmtree(place)
    found = {
        "kills": kills,
        "in_a_save": in_save,
        "runs": rounds,
        "seconds_a_run": round(took, 3),
        "device": options.device,
        "graphs": options.graphs,
        "equal": True,
    }
    harness.emit("kill_and_resume", options.out, case=f"{kills} kills", **found)


if __name__ == "__main__":
    main()
