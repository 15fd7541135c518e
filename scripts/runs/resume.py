"""Whether a run begins or is resumed, and where: `--res_path`, `--overwrite`, `--resume`.

All is decided before anything is written, and nothing that was decided changes later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

import gpt2
from gpt2.training import snapshots

from ..cli.options import build, early, program
from . import folder, processes
from .data import shares

TRANSIENT = ("config", "resume", "overwrite", "res_path")  # options of one start, not of the run
FREE = ("logging_steps", "prompts", "generate", "device", "cache", "save_every")


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a run starts: its folder, None for a new one, and whether it goes on with what is there.

    The kind, "qa" or "search", names a numbered folder; adapters are the folders of those it makes.
    """

    kind: str
    place: str | None
    resume: bool
    adapters: Sequence[str]


def config(words: Sequence[str], script: str, default: Path) -> tuple[Path, list[str]]:
    """The YAML file of options and the words without it: the one named, or of a run that is resumed
    its own, or the default. A ValueError where that run is of the other script."""
    named, rest = early(words, "config")
    if named.config is not None:
        return Path(named.config), rest
    start, _ = early(rest, "resume", "res_path")
    place = start.resume or (start.res_path if start.resume is not None else None)
    file = Path(place or "", folder.OPTIONS)
    if not (place and file.is_file()):
        return default, rest
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    owner = "search" if any(line.startswith("space:") for line in lines) else "train_qa"
    if owner != script:
        name = program(owner)
        raise ValueError(f"{place} holds a run of {name}: go on with {name} --resume {place}.")
    return file, rest


def decide_training(options: Namespace, names: Sequence[str]) -> Start:
    """How the training of one adapter, or of several, starts; errors as those of `decide`."""
    if processes.restarts("MAX_RESTARTS") and options.res_path is None and not options.resume:
        raise ValueError("torchrun's --max_restarts needs --res_path, where a restart looks.")
    shares(options)
    build(gpt2.RunConfig, options, folder=Path(options.res_path or folder.NUMBERED))
    tasks = names if options.tasks else ()
    check = partial(_check_training, options, tasks)
    return decide(options, "qa", tasks or [folder.ADAPTER], check)


def decide(
    options: Namespace, kind: str, adapters: Sequence[str], check: Callable[[Path], None]
) -> Start:
    """How a run starts; nothing is written, and what is contradictory raises.

    `check` raises a FileNotFoundError where a folder holds nothing to go on from.
    """
    resume, overwrite = bool(options.resume), bool(options.overwrite)
    named = options.resume if isinstance(options.resume, str) else options.res_path
    what = "search" if kind == "search" else "run"
    if resume and overwrite:
        raise ValueError("--resume goes on with a run and --overwrite replaces it: give one.")
    if resume and options.res_path not in (None, named):
        raise ValueError(
            f"--resume goes on in {named}, and --res_path names {options.res_path}: give one."
        )
    if resume and named is None:
        raise ValueError(f"Name the folder of the {what} that is to go on: --resume FOLDER.")
    place = Path(named or "")
    if resume or processes.restarts():
        try:
            check(place)
            resume = True
        except FileNotFoundError:
            if resume and (place / folder.RUN).is_file():
                raise FileNotFoundError(
                    f"The {what} in {place} came to its end: there is nothing left to do. Begin "
                    "another in a folder of its own."
                ) from None
            if resume:
                raise
            overwrite = True  # torchrun's own restart of a run that had nothing to go on from
    if not resume:
        folder.check(named, adapters, overwrite=overwrite)
    if named and place.is_dir() and not processes.rank():
        with folder.locked(place):
            pass
    return Start(kind=kind, place=named, resume=resume, adapters=adapters)


@contextmanager
def begun(start: Start, options: Namespace) -> Iterator[Path]:
    """The run's folder, for this run alone, with its options."""
    if processes.rank():  # the first has it, for all
        yield Path(start.place or folder.NUMBERED)
        return
    made = None if start.resume else folder.prepare(start.place, start.kind, start.adapters)
    place = made or Path(start.place or "")
    with folder.locked(place):
        if made:
            text = yaml.safe_dump(kept(options), sort_keys=False)
            (place / folder.OPTIONS).write_text(text, encoding="utf-8")
        try:
            yield place
        except BaseException as stop:
            trained = [place / n for n in start.adapters if any((place / n).glob("*.safetensors"))]
            if trained and not getattr(stop, "__notes__", ()):
                stop.add_note(f"The trained adapter is in {', '.join(map(str, trained))}.")
            raise


@contextmanager
def resumable(place: Path) -> Iterator[None]:
    """What is stopped within tells how to go on."""
    try:
        yield
    except (KeyboardInterrupt, OSError) as stop:  # such as a full disk
        stop.add_note(f"Go on with --resume {place}.")
        raise


def has_snapshot(place: Path) -> bool:
    """Whether a training in this folder can go on from a snapshot."""
    return any((place / name).is_file() for name in snapshots.NAMES)


def kept(options: Namespace) -> dict[str, Any]:
    """The options of a run, as its folder keeps them."""
    values = {name: value for name, value in options.as_dict().items() if name not in TRANSIENT}
    return yaml.safe_load(yaml.safe_dump(values))


def check_same(what: str, place: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """A ValueError where a run would not be gone on with as it was begun."""
    names = [n for n in {**then, **now} if n not in FREE and then.get(n) != now.get(n)]
    if names:
        odd = ", ".join(f"{n} was {then.get(n)!r:.80}, is {now.get(n)!r:.80}" for n in names)
        raise ValueError(
            f"The {what} in {place} cannot be gone on with: {odd}. Give what it was begun with, or "
            "begin anew in another folder."
        )


def _check_training(options: Namespace, tasks: Sequence[str], place: Path) -> None:
    """The error of a folder without a training to go on from, of one adapter or of several."""
    ended = all((place / name / folder.RUN).is_file() for name in tasks)
    if not tasks or ended or not (place / folder.OPTIONS).is_file():
        snapshots.check(place)
        return
    then = yaml.safe_load((place / folder.OPTIONS).read_text(encoding="utf-8")) or {}
    check_same("run", place, then, kept(options))
