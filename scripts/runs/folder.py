"""A run's folder: the names of its files, a place that is free, one run at a time in it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gpt2.training.snapshots import NAMES as SNAPSHOTS

from ..cli.options import program

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ADAPTER, LAST = "adapter", "last"
METRICS, PLOT, ANSWERS, RUN = "metrics.jsonl", "loss.png", "answers.md", "run.json"
OPTIONS, ALL_ANSWERS, REPORT = "options.yaml", "answers.jsonl", "report.html"
WINNER, TRAINED_BY, LEADERBOARD, CURVES = "best", "train.yaml", "leaderboard.jsonl", "curves.jsonl"
SEARCH_PLOT, STUDY, WAVES = "search.png", "study.db", "waves"
SEARCHED = (LEADERBOARD, CURVES, SEARCH_PLOT, STUDY, WAVES)
RESULTS = (*SEARCHED, METRICS, PLOT, ANSWERS, ALL_ANSWERS, RUN, REPORT, *SNAPSHOTS)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NUMBERED = Path("runs")


def check(place: str | None, adapters: Sequence[str], *, overwrite: bool) -> None:
    """Find out, and write nothing, whether a run may be written here."""
    if place is not None and (not place.strip() or "\0" in place):
        raise ValueError(f"res_path {place!r} names no folder; leave it out for a new one.")
    folder = NUMBERED if place is None else Path(place)
    names = () if place is None else (*adapters, *RESULTS)
    if (held := [name for name in names if (folder / name).exists()]) and not overwrite:
        raise ValueError(
            f"{folder} holds a run ({', '.join(held)}): name another res_path, leave it out for a "
            "new folder, pass --overwrite true, or go on with it by --resume."
        )
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise OSError(f"{folder} cannot be written: choose another res_path.")


def prepare(place: str | None, kind: str, adapters: Sequence[str]) -> Path:
    """Make the folder: the one named, without an earlier run's results, or a new numbered one."""
    if place is None:
        return _numbered(kind)
    folder = Path(place)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = [folder / name for name in adapters]
        saved = [*own, folder / LAST, *(adapter / LAST for adapter in own)]
        with locked(folder):
            shutil.rmtree(folder / WAVES, ignore_errors=True)
            old = [adapter / file for adapter in saved for file in (WEIGHTS, CONFIG, TRAINED_BY)]
            for file in (*old, *(at / name for at in (folder, *own) for name in RESULTS)):
                file.unlink(missing_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise OSError(f"{folder} cannot be written: {error}. Choose another res_path.") from None


def _numbered(kind: str) -> Path:
    number = 1
    while True:
        try:  # of two runs that start at once, one gets the next number
            (NUMBERED / f"{kind}-{number}").mkdir(parents=True)
            return NUMBERED / f"{kind}-{number}"
        except FileExistsError:
            number += 1


def write_whole(file: Path, text: str) -> None:
    """Write a file whole or not at all; what is no text, such as half a character, as its code."""
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def locked(place: Path, *, option: str = "res_path") -> Iterator[None]:
    """No other run writes in the folder or the file meanwhile; `option` is what names another."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(
            f"Another run works in {place}: wait for its end, or name another {option}."
        ) from None
    finally:
        os.close(descriptor)


def adapter_in(place: str) -> Path:
    """The adapter in a run's folder, or the folder itself."""
    inside = sorted(file.parent for file in Path(place).glob(f"*/{CONFIG}"))
    if not inside and Path(place, OPTIONS).is_file():
        raise ValueError(f"{place} holds a run that has no adapter yet: --resume {place} goes on.")
    if not inside or Path(place, CONFIG).is_file():
        return Path(place)
    if len(inside) > 1 and [file.name for file in inside] != [ADAPTER, LAST]:
        names = ", ".join(map(str, inside))
        raise ValueError(f"{place} holds several adapters: name one of {names}.")
    return inside[0]  # the best, where the last is beside it


def base_of(adapter: str | None) -> str:
    """The base that an adapter says it was made for; the demo's where it does not say."""
    if adapter is None:
        return "demo"
    try:
        config = json.loads((adapter_in(adapter) / CONFIG).read_bytes())
        return config["base_model_name_or_path"] or "demo"
    except (OSError, ValueError, LookupError, TypeError):
        return "demo"  # what is wrong with the adapter is said when it is loaded


def command(script: str, *words: str) -> str:
    """The command that starts a script, ready to copy into a shell."""
    start = program(script).split()
    if start == [f"{script}.py"]:
        files, here = (
            (Path(sys.executable), Path(__file__).resolve().parents[1] / start[0]),
            Path.cwd(),
        )
        start = [str(f.relative_to(here) if f.is_relative_to(here) else f) for f in files]
    return shlex.join([*start, *words])


def commands(config: Path, adapters: Sequence[Path], base: str, prompt: str) -> dict[str, str]:
    """The commands that train again as a config has it, and those that use the adapters."""
    lines, folder = list[str](), config.parent
    for adapter in adapters:
        tail = ["--base", base, "--adapter", str(adapter)]
        words = [prompt, *tail] if not prompt.startswith("-") else [*tail, "--", prompt]
        merged = adapter.with_name(f"{adapter.name}-merged")
        merged = folder / "merged" if adapter == folder else merged
        lines.append(command("generate", *words))
        lines.append(command("merge", str(adapter), str(merged), "--base", base))
    return {"again": command("train_qa", "--config", str(config)), "use": "\n".join(lines)}
