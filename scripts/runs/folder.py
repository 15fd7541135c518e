"""A run's folder: its files, its lock, its record."""

import fcntl
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from jsonargparse import Namespace
from rich.console import Console

import gpt2
from gpt2.training.snapshots import NAME as SNAPSHOT

from ..cli.options import program

ADAPTER, LAST = "adapter", "last"
METRICS, PLOT, ANSWERS, RUN = "metrics.jsonl", "loss.png", "answers.md", "run.json"
OPTIONS, REPORT = "options.yaml", "report.html"
WINNER, TRAINED_BY, LEADERBOARD = "best", "train.yaml", "leaderboard.jsonl"
SEARCH_PLOT, STUDY, WAVES = "search.png", "study.db", "waves"
SEARCHED = (LEADERBOARD, SEARCH_PLOT, STUDY, WAVES)
RESULTS = (*SEARCHED, METRICS, PLOT, ANSWERS, RUN, REPORT, SNAPSHOT)
CONFIG = "adapter_config.json"
NUMBERED = Path("runs")


def check(named: str | None, adapters: list[str], *, overwrite: bool) -> None:
    """Raise where a run may not be written."""
    if named is not None and (not named.strip() or "\0" in named):
        raise ValueError(f"res_path {named!r} names no folder: leave it out for a new one.")
    root = NUMBERED if named is None else Path(named)
    names = () if named is None else (*adapters, *RESULTS)
    if (held := [name for name in names if (root / name).exists()]) and not overwrite:
        raise ValueError(
            f"{root} holds a run ({', '.join(held)}): name another res_path, or pass --resume or "
            "--overwrite true."
        )

    nearest = next(p for p in (root, *root.absolute().parents) if p.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise OSError(f"{root} cannot be written: choose another res_path.")


def prepare(named: str | None, kind: str, adapters: list[str]) -> Path:
    """Make the named folder, without old results, or a numbered one."""
    if named is None:
        for number in count(1):
            root = NUMBERED / f"{kind}-{number}"
            with suppress(FileExistsError):  # two runs at once
                root.mkdir(parents=True)
                return root

    root = Path(named or "")
    root.mkdir(parents=True, exist_ok=True)
    with locked(root):
        shutil.rmtree(root / WAVES, ignore_errors=True)
        runs = [root, *(root / name for name in adapters)]
        old = [run / name for run in runs for name in RESULTS]
        for saved in (*runs[1:], *(run / LAST for run in runs)):
            old += [saved / name for name in ("adapter_model.safetensors", CONFIG, TRAINED_BY)]
        for file in old:
            file.unlink(missing_ok=True)
    return root


def write_whole(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_text(text, "utf-8", "backslashreplace")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def unused(path: str) -> Path:
    """A path to write to, new or an empty folder."""
    if not path or (Path(path).exists() and not (Path(path).is_dir() and not os.listdir(path))):
        raise ValueError(f"{path or repr('')} is not an empty folder: name a new one.")
    return Path(path)


@contextmanager
def locked(path: Path, *, option: str = "res_path") -> Iterator[None]:
    """Keep other runs out; `option` is how to name another path."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"Another run works in {path}: wait, or name another {option}.") from None
    finally:
        os.close(descriptor)


def adapter_in(path: str) -> Path:
    """The adapter in a run's folder, or the path itself."""
    inside = sorted(file.parent for file in Path(path).glob(f"*/{CONFIG}"))
    if not inside and Path(path, OPTIONS).is_file():
        raise ValueError(f"{path} has no adapter yet: go on with --resume {path}.")
    if not inside or Path(path, CONFIG).is_file():
        return Path(path)
    if len(inside) > 1 and [file.name for file in inside] != [ADAPTER, LAST]:
        names = ", ".join(map(str, inside))
        raise ValueError(f"{path} holds several adapters: name one of {names}.")
    return inside[0]  # before the last


def base_of(adapter: str | None) -> str:
    """The base that an adapter names, or the demo's."""
    with suppress(OSError, ValueError, LookupError, TypeError):  # loading reports
        config = json.loads((adapter_in(adapter) / CONFIG).read_bytes()) if adapter else {}
        return config["base_model_name_or_path"] or "demo"
    return "demo"


def commands(adapters: list[Path], base: str, prompt: str) -> str:
    """The shell commands that use adapters, a line each."""
    lines = list[str]()
    for adapter in map(str, adapters):
        words = ["--base", base, "--adapter", adapter]
        words = [*words, "--", prompt] if prompt.startswith("-") else [prompt, *words]
        merged = [adapter, f"{adapter}/merged", "--base", base]
        for script, more in (("generate", words), ("merge", merged)):
            start = program(script).split()
            if len(start) == 1:  # a file
                start = [sys.executable, str(Path(__file__).resolve().parents[1] / start[0])]
            lines.append(shlex.join([*start, *more]))
    return "\n".join(lines)


class Clock:
    """Seconds of laps by name."""

    def __init__(self) -> None:
        self.laps, self._last = dict[str, float](), perf_counter()

    def lap(self, name: str) -> None:
        """End a lap."""
        now = perf_counter()
        self.laps[name], self._last = round(now - self._last, 3), now


def about(
    options: Namespace, model: gpt2.GPT2, clock: Clock, data: list[gpt2.Dataset]
) -> dict[str, Any]:
    """A record's common part; `data`: all that was trained on."""
    weight = next(model.parameters())
    machine: dict[str, Any] = {"processor": platform.machine(), "cores": os.cpu_count()}
    if weight.is_cuda:
        machine["gpu"] = torch.cuda.get_device_name(weight.device)
    return {
        "config": {name: value for name, value in options.as_dict().items() if name != "config"},
        "device": str(weight.device),
        "machine": machine,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "seconds": clock.laps,
        "data": {
            "examples": sum(map(len, data)),
            "tokens": sum(one.n_tokens for one in data),
            "truncated": sum(one.truncated for one in data),
        },
    }


def write(root: Path, record: Mapping[str, Any]) -> None:
    """Write the record, which marks the run as ended."""
    text = json.dumps(record, indent=2, ensure_ascii=False, default=asdict)
    write_whole(root / RUN, f"{text}\n")


def differences(then: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()) -> str:
    """The values in which two records differ, but for `free`."""
    now = json.loads(json.dumps(now))  # as read back
    names = [n for n in {**then, **now} if n not in free and then.get(n) != now.get(n)]
    return ", ".join(f"{n} was {then.get(n)!r:.80}, is {now.get(n)!r:.80}" for n in names)


def examples_line(data: gpt2.Dataset) -> str:
    """How many examples and tokens, and how many were cut."""
    line = f"{len(data):,} examples, {data.n_tokens:,} tokens"
    if data.truncated:
        share = f"{data.truncated:,} ({data.truncated / len(data):.1%})"
        line += f"; {share} longer than {data.longest} were cut: see --max_token_length"
    return f"{line}."


def end(console: Console, root: Path, use: str) -> None:
    """Show where the results are, and how to use them."""
    names = ", ".join(sorted(file.name for file in root.iterdir()))
    for line in (f"Saved in {root}: {names}", "To use it:", use):
        console.print(line, soft_wrap=True)
