"""A run's folder: a new one, one that is empty of runs, or one whose run is gone on with."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from gpt2.training.snapshots import NAMES as SNAPSHOTS

from ..cli import cli
from . import lock

ADAPTER, LAST = "adapter", "last"
METRICS, PLOT, ANSWERS, RUN = "metrics.jsonl", "loss.png", "answers.md", "run.json"
OPTIONS, ALL_ANSWERS, REPORT = "options.yaml", "answers.jsonl", "report.html"
WINNER, TRAINED_BY, LEADERBOARD, CURVES = "best", "train.yaml", "leaderboard.jsonl", "curves.jsonl"
SEARCH_PLOT, STUDY, WAVES = "search.png", "study.db", "waves"
SEARCHED = (LEADERBOARD, CURVES, SEARCH_PLOT, STUDY)
OURS = (*SEARCHED, METRICS, PLOT, ANSWERS, ALL_ANSWERS, RUN, OPTIONS, REPORT, *SNAPSHOTS)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NUMBERED = Path("runs")


@dataclass(frozen=True)
class Places:
    """Where an adapter of this name goes: its best, and beside validation data its last.

    `run` is the folder that a run of it, and perhaps of others, is gone on with.
    """

    adapter: str
    run: Path
    best: Path
    last: Path


def check(place: str | None, *, overwrite: bool, adapters: Sequence[str] = (ADAPTER,)) -> None:
    """Find out, and write nothing, whether a run may be written here.

    Raises:
        ValueError: the folder holds a run, which nothing said to overwrite.
        OSError: it cannot be written.
    """
    if place is not None and (not place.strip() or "\0" in place):
        raise ValueError(f"res_path {place!r} names no folder; leave it out for a new one.")
    folder = NUMBERED if place is None else Path(place)
    names = () if place is None else (*adapters, *OURS)
    if (held := [name for name in names if (folder / name).exists()]) and not overwrite:
        raise ValueError(
            f"{folder} holds a run ({', '.join(held)}): name another res_path, leave it out for a "
            "new folder, pass --overwrite true, or go on with it by --resume."
        )
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise OSError(f"{folder} cannot be written: choose another res_path.")


def prepare(place: str | None, adapters: Sequence[str] = (ADAPTER,)) -> Path:
    """Make the folder: the one named, without an earlier run's results, or a new numbered one.

    Raises:
        OSError: it cannot be written.
    """
    if place is None:
        return _numbered("search" if WINNER in adapters else "qa")
    folder = Path(place)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        places = [folder / name for name in adapters]
        both = [*places, folder / LAST, *(place / LAST for place in places)]
        old = [place / file for place in both for file in (WEIGHTS, CONFIG)]
        with lock.held(folder):
            for file in (*old, *(place / name for place in (folder, *places) for name in OURS)):
                file.unlink(missing_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise OSError(f"{folder} cannot be written: {error}. Choose another res_path.") from None


def is_begun(folder: Path, adapters: Sequence[str]) -> bool:
    """Whether a run of several adapters was begun here, and has not come to its end."""
    ended = all((folder / name / RUN).is_file() for name in adapters)
    return (folder / OPTIONS).is_file() and not ended


def _numbered(kind: str) -> Path:
    NUMBERED.mkdir(exist_ok=True)
    for number in count(1):
        folder = NUMBERED / f"{kind}-{number}"
        try:
            folder.mkdir()  # of two runs that start at once, one gets the next number
        except FileExistsError:
            continue
        return folder
    raise AssertionError("count ends never")


def commands(
    place: Path, adapters: Sequence[Path], base: str, prompts: Sequence[str]
) -> dict[str, str]:
    """The commands that run it again, into a new folder, and those that use what it made."""
    prompt = min(prompts, key=len, default="Once upon a time")
    again = shlex.join([*_started("train_qa"), "--config", str(place / OPTIONS)])
    return {"again": again, "use": next_commands(place, adapters, base, prompt)}


def of_winner(place: Path, base: str, prompt: str) -> dict[str, str]:
    """The commands that train a search's winner again, and those that use it."""
    best = place / WINNER
    again = shlex.join([*_started("train_qa"), "--config", str(best / TRAINED_BY)])
    return {"the winner again, alone": again, "use": next_commands(place, [best], base, prompt)}


def next_commands(folder: Path, adapters: Iterable[Path], base: str, prompt: str) -> str:
    """The commands that use what a run made, ready to copy into a shell."""
    lines: list[str] = []
    for place in adapters:
        tail = ["--base", base, "--adapter", str(place)]
        words = [prompt, *tail] if not prompt.startswith("-") else [*tail, "--", prompt]
        merged = folder / "merged" if place == folder else place.with_name(f"{place.name}-merged")
        lines.append(shlex.join([*_started("generate"), *words]))
        lines.append(shlex.join([*_started("merge"), str(place), str(merged), "--base", base]))
    return "\n".join(lines)


def _started(script: str) -> list[str]:
    name = cli.program(script)
    if not name.endswith(".py"):
        return name.split()
    here = Path.cwd()
    files = (Path(sys.executable), Path(__file__).resolve().parents[1] / name)
    return [str(f.relative_to(here) if f.is_relative_to(here) else f) for f in files]
