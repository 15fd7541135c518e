"""The search: how long the best of many takes, and how often halving finds what all runs would.

    python -m benchmarks.search --article 1                        seconds, process start to report
    python -m benchmarks.search --processes "1;2"                  trials a second, one a GPU
    python -m benchmarks.search --grid 1 --data train.jsonl --valid valid.jsonl --seeds 10

The grid is run whole once a seed. Since a trial is what it is alone, whoever its neighbours are,
halving and random search are then read off the same runs.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from math import comb
from pathlib import Path
from typing import Any

import torch
import yaml

import gpt2
from benchmarks import harness
from scripts import search
from scripts.tuner import trials
from scripts.tuner.halving import Halving, Plan
from scripts.tuner.trials import Run
from scripts.tuner.waves import Waves

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
ALL = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
GRID = {
    "lr": [5e-4, 1e-3, 2e-3, 4e-3],
    "r": [4, 16],
    "alpha_over_r": [1, 2],
    "targets": [["c_attn"], ALL],
}
RUNGS, KEEP, WITHIN = 5, 2, 0.01
THREADS = "8"  # of each process, whether alone or not: torchrun gives one of several a single one
SPACE = {
    "lr": {"low": 1e-5, "high": 3e-3},
    "r": [2, 4, 8],
    "alpha_over_r": [1, 2, 4],
    "dropout": [0.0, 0.1],
}


def main() -> None:
    a = harness.arguments(
        __doc__,
        article=0,
        processes="",
        grid=0,
        data="",
        valid="",
        first=0,
        seeds=10,
        examples=8000,
        held_out=400,
    )
    if a.article:
        harness.emit("search", a.out, case="best of 512 article-size runs", **article(a))
    for n in filter(None, a.processes.split(";")):
        harness.emit("search", a.out, case=f"{n} processes", **waves_by(a, int(n)))
    if a.grid:
        for seed in range(a.first, a.seeds):
            harness.emit("search", a.out, case="halving on a grid", seed=seed, **grid(a, seed))


def article(a: Any) -> dict[str, Any]:
    """The script itself, from its start to its end."""
    with tempfile.TemporaryDirectory() as place:
        script = prepared(a, place, trials=512, slots=256, rungs=4, finalists=3, seeds=3)
        began = time.time()
        subprocess.run([sys.executable, *script], check=True)
        seconds = time.time() - began
        found = json.loads(Path(place, "run", "run.json").read_text())
    sizes = [[len(rung["trials"]), rung["share"]] for rung in found["rungs"]]
    return {
        "seconds": round(seconds, 1),
        "laps": found["seconds"],
        "adapter_steps": found["adapter_steps"],
        "rungs": sizes,
    }


def waves_by(a: Any, processes: int) -> dict[str, Any]:
    """Trials a second of several processes, from the end of their first waves to that of the last.

    What starts and captures is left out, which does not grow with the search.
    """
    slots, trials, ends = 64, 512, dict[str, float]()
    env = os.environ | {"OMP_NUM_THREADS": THREADS}
    with tempfile.TemporaryDirectory() as place:
        script = prepared(a, place, trials=trials, slots=slots, rungs=1, finalists=1, seeds=2)
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        run = subprocess.Popen([sys.executable, *torchrun, *script, "--steps", "400"], env=env)
        while run.poll() is None:
            for file in Path(place, "run", "waves").glob("rung-1-wave-*.safetensors"):
                if "so-far" not in file.name:
                    with suppress(FileNotFoundError):  # the search is over
                        ends[file.stem] = file.stat().st_mtime
            time.sleep(0.02)
    if run.returncode:
        raise SystemExit(run.returncode)
    first = [end for name, end in ends.items() if name.split("-of-")[0] == "rung-1-wave-1"]
    later = trials - slots * processes
    seconds = max(ends.values()) - max(first)
    return {"trials": trials, "slots": slots, "trials_per_s": round(later / seconds, 2)}


def prepared(a: Any, place: str, **sizes: Any) -> list[str]:
    """A search on GPT-2 124M of random weights, on which times do not depend."""
    torch.manual_seed(0)
    gpt2.GPT2(gpt2.SIZES["gpt2"]).save_pretrained(Path(place, "base"))
    asked = [f"What is number {i}?" for i in range(32)]
    rows = [{"question": q, "answer": f"It is {q[8:-1]}."} for q in asked]
    held_out, test = (Path(place, f"{name}.jsonl") for name in ("held_out", "test"))
    for file, some in ((held_out, rows[::2]), (test, rows[1::2])):
        file.write_text("".join(json.dumps(row) + "\n" for row in some))
    options = {
        "model_name": f"{place}/base",
        "data": str(SCRIPTS / "data" / "article.jsonl"),
        "validation": str(held_out),
        "test": str(test),
        "res_path": f"{place}/run",
        "device": a.device,
        "autocast": a.device != "cpu",
        "steps": 2500,
        "lora": {"r": 8, "alpha": 16},
        "keep": 4,
        "space": SPACE,
    }
    config = Path(place, "search.yaml")
    config.write_text(yaml.safe_dump(options | sizes))
    return [str(SCRIPTS / "search.py"), "--config", str(config)]


def grid(a: Any, seed: int) -> dict[str, Any]:
    """All of the grid; then what halving and random search would have found of it."""
    halving = rungs_of_grid()
    losses = whole_grid(a, seed, halving)
    last = [row[-1] for row in losses]
    alive = dict.fromkeys(range(len(losses)))
    cost = 0.0
    for rung in range(RUNGS):
        cost += len(alive) * halving.steps(rung, 2**20) / 2**20 / len(losses)
        alive = dict.fromkeys(halving.going_on({n: losses[n][rung] for n in alive}, rung))
    best, found = min(last), last[next(iter(alive))]
    good = sum(loss <= best * (1 + WITHIN) for loss in last)
    tries = int(cost * len(losses))
    missed = comb(len(losses) - good, tries) / comb(len(losses), tries)
    return {
        "best": round(best, 4),
        "found": round(found, 4),
        "within_1_percent": found <= best * (1 + WITHIN),
        "share_of_all_steps": round(cost, 4),
        "good_of_all": f"{good} of {len(losses)}",
        "random_at_equal_cost": round(1 - missed, 3),
        "losses": [[round(loss, 4) for loss in row] for row in losses],
    }


def rungs_of_grid() -> Halving:
    """The rungs of the grid."""
    return Halving(trials=math.prod(map(len, GRID.values())), rungs=RUNGS, keep=KEEP)


def whole_grid(a: Any, seed: int, halving: Halving) -> list[list[float]]:
    """Each configuration's held-out loss where each rung ends."""
    given = ["--config", str(SCRIPTS / "configs" / "search_e2e.yaml"), "--validation", a.valid]
    options = search.options_of(given)
    options.epochs, options.warmup_steps = 1, a.examples // options.train_batch_size // 32
    options.autocast = options.compile = a.device != "cpu"
    usual = search.usual_of(options)
    dimensions = trials.read_space(GRID, 1, usual)
    grid = list(dimensions.all())
    model = gpt2.GPT2.from_pretrained("demo", device=a.device, dropout=0.0)
    how = {"max_length": 128, "answer_only": True}
    learnt, held_out = (
        gpt2.encode(list(itertools.islice(gpt2.stream_examples(f), n)), gpt2.Tokenizer(), **how)
        for f, n in ((a.data, a.examples), (a.valid, a.held_out))
    )
    total = gpt2.total_steps(learnt, usual.training)
    some = [
        Run(trial=i, recipe=usual.varied(values).seeded(seed), total=total)
        for i, values in enumerate(grid)
    ]
    sizes: dict[str, Any] = {"trials": len(some), "slots": len(some), "rungs": RUNGS, "keep": KEEP}
    sizes |= {"sampler": "random", "finalists": 1, "seeds": 1}
    plan = Plan(space=dimensions, usual=usual, **sizes)
    with Waves(model, learnt, held_out, plan) as work:
        for rung in range(RUNGS):
            work.train(some, rung, lambda steps: None)
    return [
        [run.losses.get(halving.step(r, total), math.inf) for r in range(RUNGS)] for run in some
    ]


if __name__ == "__main__":
    main()
