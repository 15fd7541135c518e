"""Whether and where a run begins or is resumed."""

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import Namespace

from . import folder, processes

TRANSIENT = ("config", "resume", "overwrite", "res_path")
FREE = "logging_steps prompts generate device cache save_every".split()
FREE += "patience eval_every data model_name validation test".split()  # or fingerprints


class Start(NamedTuple):
    """A run's start."""

    kind: str  # "qa" or "search"
    root: str | None  # None: a new folder
    resume: bool
    adapters: list[str]  # folders in root


def config(words: list[str], default: Path) -> tuple[Path, list[str]]:
    """The YAML file: named, the resumed run's or the default; and other words."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--config", nargs="?", const="")
    named, rest = early.parse_known_args(words)
    if named.config is not None:
        return Path(named.config), rest
    early.add_argument("--resume", nargs="?", const="")
    early.add_argument("--res_path", nargs="?", const="")
    start, _ = early.parse_known_args(rest)
    root = start.resume or (start.res_path if start.resume is not None else None)
    file = Path(root or "", folder.OPTIONS)
    return file if root and file.is_file() else default, rest


def decide(options: Namespace, kind: str, adapters: list[str]) -> Start:
    """Decide how a run starts, and check it; nothing is written."""
    resume, overwrite = bool(options.resume), bool(options.overwrite)
    named = options.resume if isinstance(options.resume, str) else options.res_path
    root = Path(named or "")
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other: give one.")
    if resume and options.res_path not in (None, named):
        raise ValueError(f"--resume names {named}, --res_path names {options.res_path}: give one.")
    if resume and named is None:
        raise ValueError("Name the run's folder: --resume FOLDER.")
    resumable = (root / folder.OPTIONS).is_file() and not (root / folder.RUN).is_file()
    if kind == "qa" and not options.tasks:
        resumable = resumable and (root / folder.SNAPSHOT).is_file()
    if resume and not resumable:
        raise FileNotFoundError(
            f"{root} has nothing to resume: no snapshot was saved, or the run has ended."
        )
    if processes.restarts():  # the options are of the first
        resume, overwrite = resumable, not resumable
    if resume:
        then = yaml.safe_load((root / folder.OPTIONS).read_text("utf-8"))
        check_same(root, then, kept(options))
    else:
        folder.check(named, adapters, overwrite=overwrite)
    if named and root.is_dir() and not processes.rank():
        with folder.locked(root):
            pass
    return Start(kind, named, resume, adapters)


@contextmanager
def begun(start: Start, options: Namespace) -> Iterator[Path]:
    """Lock and yield the run's folder; an error gets a note."""
    root = Path(start.root or folder.NUMBERED)
    if processes.rank():  # the first locks it
        yield root
        return
    if not start.resume:
        root = folder.prepare(start.root, start.kind, start.adapters)
    with folder.locked(root):
        if not start.resume:
            text = yaml.safe_dump(kept(options), sort_keys=False)
            (root / folder.OPTIONS).write_text(text, "utf-8")
        try:
            yield root
        except BaseException as stop:
            trained = [root / n for n in start.adapters if any((root / n).glob("*.safetensors"))]
            resumable = start.kind == "search" and not (root / folder.RUN).is_file()
            if getattr(stop, "__notes__", ()):
                pass
            elif resumable and isinstance(stop, KeyboardInterrupt | OSError):
                stop.add_note(f"Go on with --resume {root}.")
            elif trained:
                stop.add_note(f"The trained adapter is in {', '.join(map(str, trained))}.")
            raise


def kept(options: Namespace) -> dict[str, Any]:
    """The options that a run's folder keeps."""
    values = {name: value for name, value in options.as_dict().items() if name not in TRANSIENT}
    return json.loads(json.dumps(values))  # plain numbers


def check_same(root: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise where a run would not be resumed as it began."""
    if odd := folder.differences(then, now, FREE):
        raise ValueError(
            f"{root} cannot be resumed: {odd}. Give the old value, or name a new folder."
        )
