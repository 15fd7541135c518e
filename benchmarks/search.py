"""The search: how long the best of many takes, and how often halving finds what all runs would.

    python -m benchmarks.search --article 1                        seconds, process start to report
    python -m benchmarks.search --processes "1;2"                  trials a second, one a GPU
    python -m benchmarks.search --grid 1 --data train.jsonl --valid valid.jsonl --seeds 10

The grid is run whole once a seed. Since a trial is what it is alone, whoever its neighbours are,
halving and random search are then read off the same runs.
"""

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

import gpt2
import lora
from benchmarks import harness, models
from scripts.tuner.halving import Halving, Plan
from scripts.tuner.trials import Recipe, Run, read_space
from scripts.tuner.waves import Waves

SCRIPTS = harness.ROOT / "scripts"
GRID: dict[str, list[Any]] = {
    "lr": [5e-4, 1e-3, 2e-3, 4e-3],
    "r": [4, 16],
    "alpha_over_r": [1, 2],
    "targets": [["c_attn"], list(models.ALL)],
}
RUNGS, KEEP, WITHIN = 5, 2, 0.01
THREADS = "8"  # of each process, whether alone or not: torchrun gives one of several a single one
SPACE = {
    "lr": {"low": 1e-5, "high": 3e-3},
    "r": [2, 4, 8],
    "alpha_over_r": [1, 2, 4],
    "dropout": [0.0, 0.1],
}
SIZES = {"slots": 64, "rungs": 1, "finalists": 1, "seeds": 2, "steps": 400}


def main() -> None:
    data = {"data": "", "valid": "", "examples": 8000, "held_out": 400}
    a = harness.arguments(__doc__, article=0, processes="", grid=0, seeds=10, **data)
    if a.article:
        sizes = {"trials": 512, "slots": 256, "rungs": 4, "finalists": 3, "seeds": 3}
        facts = whole_search(a, 1, steps=2500, **sizes)
        harness.emit("search", a.out, case="best of 512 article-size runs", **facts)
    for n in map(int, filter(None, a.processes.split(";"))):
        few, many = (whole_search(a, n, trials=trials, **SIZES) for trials in (128, 512))
        rate = (512 - 128) / (many["seconds"] - few["seconds"])  # starting and capturing left out
        facts = {"trials": 512, "slots": SIZES["slots"], "trials_per_s": round(rate, 2)}
        harness.emit("search", a.out, case=f"{n} processes", **facts)
    for seed in range(a.seeds) if a.grid else ():
        harness.emit("search", a.out, case="halving on a grid", seed=seed, **grid(a, seed))


def whole_search(a: Any, processes: int, **sizes: Any) -> harness.Facts:
    """The script itself, from its start to its end, on random weights, on which no time depends."""
    with tempfile.TemporaryDirectory() as folder:
        gpt2.GPT2(gpt2.SIZES["gpt2"]).save_pretrained(Path(folder, "base"))
        rows = (SCRIPTS / "data" / "weather.jsonl").read_text().splitlines(keepends=True)
        Path(folder, "valid.jsonl").write_text("".join(rows[:16]))
        Path(folder, "test.jsonl").write_text("".join(rows[16:32]))
        options = {
            "model_name": f"{folder}/base",
            "data": str(SCRIPTS / "data" / "article.jsonl"),
            "validation": f"{folder}/valid.jsonl",
            "test": f"{folder}/test.jsonl",
            "res_path": f"{folder}/run",
            "device": a.device,
            "autocast": a.device != "cpu",
            "lora": {"r": 8, "alpha": 16},
            "keep": 4,
            "space": SPACE,
        }
        Path(folder, "search.yaml").write_text(yaml.safe_dump(options | sizes))
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        script = [str(SCRIPTS / "search.py"), "--config", f"{folder}/search.yaml"]
        command = [sys.executable, *(torchrun if processes > 1 else ()), *script]
        began = time.time()
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": THREADS})
        seconds = time.time() - began
        run = json.loads(Path(folder, "run", "run.json").read_text())
    return {"seconds": round(seconds, 1), "adapter_steps": run["adapter_steps"]}


def grid(a: Any, seed: int) -> harness.Facts:
    """All of the grid; then what halving and random search would have made of it."""
    halving = Halving(trials=math.prod(map(len, GRID.values())), rungs=RUNGS, keep=KEEP)
    losses = whole_grid(a, seed, halving)
    last = [row[-1] for row in losses]
    alive = dict.fromkeys(range(len(losses)))
    cost = 0.0
    for rung in range(RUNGS):
        cost += len(alive) * halving.steps(rung, 2**20) / 2**20 / len(losses)
        alive = dict.fromkeys(halving.survivors({n: losses[n][rung] for n in alive}, rung))
    best, halved = min(last), last[next(iter(alive))]
    good = sum(loss <= best * (1 + WITHIN) for loss in last)
    tries = int(cost * len(losses))
    missed = math.comb(len(losses) - good, tries) / math.comb(len(losses), tries)
    return {
        "best_loss": round(best, 4),
        "halving_loss": round(halved, 4),
        "within_1_percent": halved <= best * (1 + WITHIN),
        "share_of_all_steps": round(cost, 4),
        "good_of_all": f"{good} of {len(losses)}",
        "random_at_equal_cost": round(1 - missed, 3),
        "losses": [[round(loss, 4) for loss in row] for row in losses],
    }


def whole_grid(a: Any, seed: int, halving: Halving) -> list[list[float]]:
    """Each configuration's held-out loss where each rung ends."""
    fast = a.device != "cpu"
    usual = Recipe(
        adapter=lora.LoRAConfig(r=max(GRID["r"]), targets=models.ALL),
        training=gpt2.TrainConfig(
            epochs=1,
            batch_size=8,
            warmup_steps=a.examples // 8 // 32,
            weight_decay=0.01,
            autocast=fast,
            compile=fast,
        ),
        b_ratio=1.0,
    )
    model = gpt2.GPT2.from_pretrained("demo", device=a.device, dropout=0.0)
    how = {"max_length": 128, "answer_only": True}
    train, valid = (
        gpt2.encode(list(itertools.islice(gpt2.stream_examples(f), n)), gpt2.Tokenizer(), **how)
        for f, n in ((a.data, a.examples), (a.valid, a.held_out))
    )
    space, total = read_space(GRID, 1, usual), gpt2.total_steps(train, usual.training)
    runs = [
        Run(trial=trial, recipe=usual.varied(values).seeded(seed), total=total)
        for trial, values in enumerate(space.all())
    ]
    facts: dict[str, Any] = {"sampler": "random", "finalists": 1, "seeds": 1, "slots": len(runs)}
    plan = Plan(space=space, usual=usual, **vars(halving), **facts)
    with Waves(model, train, valid, plan) as waves:
        for rung in range(RUNGS):
            waves.train(runs, rung, lambda steps: None)
    ends = [halving.step(rung, total) for rung in range(RUNGS)]
    return [[run.losses.get(end, math.inf) for end in ends] for run in runs]


if __name__ == "__main__":
    main()
