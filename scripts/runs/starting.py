"""Whether a run may begin, or go on; and its folder, for it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

import gpt2
from gpt2.training import snapshots

from ..cli import cli
from . import folder, lock, processes, validation

TRANSIENT = ("config", "resume", "overwrite", "res_path")  # options of one start, not of the run
FREE = ("logging_steps", "prompts", "generate", "device", "cache", "sync_every", "save_every")


def add_options(to: ArgumentParser, kind: str = "qa") -> None:
    """Where the results and the tokens go, and whether a run is there."""
    place = f"folder for the results, by default a new runs/{kind}-N"
    to.add_argument("--res_path", type=str | None, help=place)
    cache = "folder for the tokens of the data, by default beside a large file and nowhere else"
    to.add_argument("--cache", type=str | None, help=cache)
    flag: dict[str, Any] = {"nargs": "?", "const": True, "default": False}
    over = "replace the run that res_path holds"
    to.add_argument("--overwrite", type=bool, help=over, **flag)
    again = "go on with the run of res_path, or of the folder that is named"
    to.add_argument("--resume", type=bool | str, help=again, **flag)


def check(options: Namespace, adapters: Sequence[str] = (folder.ADAPTER,)) -> None:
    """Find out, and write nothing, whether the run may be begun or gone on with.

    Raises:
        FileNotFoundError: there is nothing to go on with.
        ValueError: as `folder.check`; another run works there; options that do not go together.
    """
    if options.validation is None and (options.patience or options.eval_every):
        raise ValueError("patience and eval_every need validation data: give --validation.")
    validation.shares(options)
    if processes.may_restart() and options.res_path is None and not options.resume:
        raise ValueError("torchrun's --max_restarts needs --res_path, where a restart looks.")
    if processes.is_restart() and not options.resume:
        run = Path(options.res_path or "")
        there = [run, *(run / name for name in adapters)]
        kept = any((f / name).is_file() for f in there for name in snapshots.NAMES)
        options.resume = kept or bool(options.tasks and folder.is_begun(run, adapters))
        options.overwrite = not options.resume

    def may_go_on(place: Path) -> None:
        if options.tasks and folder.is_begun(place, adapters):
            _check_same(options, place)
        else:
            snapshots.check(place)

    check_folder(options, "run", adapters, may_go_on)
    cli.build(gpt2.RunConfig, options, folder=Path(options.res_path or folder.NUMBERED))


def check_folder(
    options: Namespace, what: str, adapters: Sequence[str], may_go_on: Callable[[Path], None]
) -> None:
    """Whether the folder is free, or what it holds may go on; its name is then in `res_path`.

    Args:
        options: of the run.
        what: it is, to a person.
        adapters: the folders of those that it makes.
        may_go_on: raises where there is nothing in a folder to go on with.

    Raises:
        ValueError: it holds a run; another one works there; or as `may_go_on`.
    """
    if options.resume:
        named = options.resume if isinstance(options.resume, str) else options.res_path
        if named is None:
            raise ValueError(f"Name the folder of the {what} that is to go on: --resume FOLDER.")
        try:
            may_go_on(Path(named))
        except FileNotFoundError:
            if (Path(named) / folder.RUN).is_file():
                raise FileNotFoundError(
                    f"The {what} in {named} came to its end: there is nothing left to do. Begin "
                    "another in a folder of its own."
                ) from None
            raise
        options.res_path = named
    else:
        folder.check(options.res_path, overwrite=options.overwrite, adapters=adapters)
    if options.res_path and Path(options.res_path).is_dir() and not processes.rank():
        with lock.held(Path(options.res_path)):
            pass


@contextmanager
def begun(options: Namespace, adapters: Sequence[str] = (folder.ADAPTER,)) -> Iterator[Path]:
    """The run's folder, for this run alone, with its options."""
    resumed = bool(options.resume)
    if processes.rank():  # the first has it, for all
        yield Path(options.res_path or folder.NUMBERED)
        return
    place = Path(options.res_path) if resumed else folder.prepare(options.res_path, adapters)
    with lock.held(place):
        if not resumed:
            write_options(options, place)
        try:
            yield place
        except BaseException as stop:
            there = [place / name for name in adapters if any((place / name).glob("*.safetensors"))]
            if there and not getattr(stop, "__notes__", ()):
                stop.add_note(f"The trained adapter is in {', '.join(map(str, there))}.")
            raise


def write_options(options: Namespace, place: Path) -> None:
    """Write the options, so that `--resume FOLDER` needs no other."""
    (place / folder.OPTIONS).write_text(_kept(options), encoding="utf-8")


def _kept(options: Namespace) -> str:
    kept = {name: value for name, value in options.as_dict().items() if name not in TRANSIENT}
    return yaml.safe_dump(kept, sort_keys=False)


def _check_same(options: Namespace, place: Path) -> None:
    """The error of several adapters that would not all be made by the same options."""
    text = (place / folder.OPTIONS).read_text(encoding="utf-8")
    then, now = yaml.safe_load(text) or {}, yaml.safe_load(_kept(options))
    names = [n for n in {**then, **now} if n not in FREE and then.get(n) != now.get(n)]
    if names:
        odd = ", ".join(f"{n} was {then.get(n)!r:.80}, is {now.get(n)!r:.80}" for n in names)
        raise ValueError(
            f"The run in {place} cannot be gone on with: {odd}. Give what it was begun with, or "
            "begin anew in another folder."
        )


def options_file(script: str, default: Path) -> Callable[[Namespace], Path]:
    """Where options come from that no flag gives: of a run that is gone on with, its own.

    Args:
        script: that asks; the run of another raises a ValueError.
        default: the file of a run that begins.
    """

    def found(given: Namespace) -> Path:
        resumed = given.get("resume")
        place = resumed if isinstance(resumed, str) else given.get("res_path") if resumed else None
        file = Path(place or "", folder.OPTIONS)
        if not (place and file.is_file()):
            return default
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        own = "search" if any(line.startswith("space:") for line in lines) else "train_qa"
        if own != script:
            name = cli.program(own)
            raise ValueError(f"{place} holds a run of {name}: go on with {name} --resume {place}.")
        return file

    return found
