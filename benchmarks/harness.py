"""What every benchmark shares: interleaved timing, peak memory, and one JSON line a result."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
Run = Callable[[], Any]
Facts = dict[str, Any]


def arguments(description: str | None, **defaults: Any) -> argparse.Namespace:
    """The command line of a benchmark: the common options, and one for each default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--against", choices=["peft"], help="measure it in the same run")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds")
    parser.add_argument("--out", help="file to append JSON lines to")
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser.parse_args()


def interleaved(runs: Mapping[str, Run], repeats: int, device: str) -> dict[str, dict[str, float]]:
    """Milliseconds by name, of runs in turns, so that a noisy moment meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(_milliseconds(run, device))
    return {name: spread(values) for name, values in times.items()}


def spread(values: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    ordered = sorted(values)
    tenth = len(ordered) // 10
    return {
        "median": round(statistics.median(ordered), 4),
        "p10": round(ordered[tenth], 4),
        "p90": round(ordered[-1 - tenth], 4),
    }


def peak_gib(run: Run, device: str, resident: int = 0) -> float | None:
    """Peak memory of one run in GiB, less the `resident` bytes that belong to others (CUDA)."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - resident) / 2**30, 3)


def attempt(work: Callable[[], Facts]) -> Facts:
    """What the work gives; a case that cannot run is a result too."""
    try:
        return work()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:200]}"}


def emit(name: str, out: str | None, **fields: Any) -> None:
    """Print a result as one JSON line with commit, machine and date, and append it to `out`."""
    record = {"benchmark": name, **fields, "commit": commit(), **machine()}
    record["date"] = str(datetime.date.today())
    line = json.dumps(record)
    print(line, flush=True)
    if out:
        with Path(out).open("a") as file:
            file.write(line + "\n")


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    cpu = f"{torch.get_num_threads()} threads, {_cpu_name()}"
    facts = {"cpu": cpu, "python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    for package in ("transformers", "peft"):
        facts[package] = version(package) if find_spec(package) else "absent"
    return facts


def commit() -> str:
    """The commit of this code, with a "+" where files have changed since.

    $COMMIT names it where there is no repository, such as on a machine that got a copy.
    """
    if given := os.environ.get("COMMIT"):
        return given
    head = git("rev-parse", "--short=7", "HEAD").stdout.strip() or "unknown"
    code = ("lora", "gpt2", "scripts", "benchmarks/*.py")
    return head + "+" * bool(git("status", "--porcelain", "--", *code).stdout)


def git(*words: str) -> subprocess.CompletedProcess[str]:
    """What git says of this repository."""
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)


def free() -> None:
    """Give back what the last case held."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _milliseconds(run: Run, device: str) -> float:
    if device == "cpu":
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
