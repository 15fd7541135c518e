"""A file of predictions: a line of JSON a prompt, in their order, that can be gone on with.

Beside it lies a record of what it is made with, so that it never holds the answers of two.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import lock
from .inputs import Asked

AGAIN = "Name another --output, or pass --overwrite true."


def digest(files: Iterable[Path]) -> str:
    """A fingerprint of these files' bytes."""
    sha = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            sha.update(hashlib.file_digest(stream, "sha256").digest())
    return sha.hexdigest()[:16]


@contextmanager
def begun(
    file: Path, made: Mapping[str, Any], wanted: Sequence[Asked], *, overwrite: bool
) -> Iterator[int]:
    """Have the file for oneself and append to it; gives how many prompts it answers already.

    A line that was cut short when its writer was stopped is taken off.

    Args:
        file: of the predictions.
        made: all that decides what they are.
        wanted: the prompts.
        overwrite: what the file holds may go.

    Raises:
        ValueError: it answers other prompts or was made with something else, and nothing said to
            overwrite it; somebody else appends to it.
        OSError: it cannot be written.
    """
    record = file.with_name(f"{file.name}.made.json")
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is not this script's, for it is no file. {AGAIN}")
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        file.touch()
    with lock.held(file, instead="--output"):
        if overwrite or not file.stat().st_size:
            os.truncate(file, 0)
            part = record.with_suffix(".part")
            part.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
            part.replace(record)
        else:
            _check(file, record, made)
        prompts = [line.get("prompt") for line in _lines(file)]
        if prompts != [a.prompt for a in wanted[: len(prompts)]]:
            raise ValueError(f"{file} answers other prompts than these. {AGAIN}")
        yield len(prompts)


def _check(file: Path, record: Path, made: Mapping[str, Any]) -> None:
    if not record.is_file():
        raise ValueError(f"{file} is not this script's, for {record.name} is missing. {AGAIN}")
    before = json.loads(record.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(made))  # as it is read back
    if odd := sorted(k for k in {*now, *before} if now.get(k) != before.get(k)):
        told = ", ".join(f"{k} {before.get(k)!r:.60} (now {now.get(k)!r:.60})" for k in odd)
        raise ValueError(f"{file} was made with other options: {told}. {AGAIN}")


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, after its last one is taken off if it has no end."""
    with file.open("rb+") as stream:
        for line in stream:
            if line.endswith(b"\n"):
                yield json.loads(line)
            else:
                stream.seek(-len(line), os.SEEK_END)
                stream.truncate()


@contextmanager
def told_where(file: Path, total: int) -> Iterator[list[int]]:
    """Whatever ends the work says how much of it is in the file; give it the counts written."""
    written: list[int] = []
    try:
        yield written
    except BaseException as stop:
        stop.add_note(
            f"{sum(written):,} of {total:,} prompts are answered in {file}; "
            "the same command goes on from there."
        )
        raise


def append(file: Path, answers: Iterable[tuple[Asked, str]]) -> None:
    """Write some answers after those that are there."""
    lines = [
        {"prompt": a.prompt, "prediction": said}
        | ({"references": list(a.references)} if a.references else {})
        for a, said in answers
    ]
    with file.open("a", encoding="utf-8", newline="\n") as stream:
        stream.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def score(file: Path) -> str:
    """How many of the prompts with references were answered as one of them, word for word."""
    lines = [line for line in _lines(file) if "references" in line]
    if not lines:
        return ""
    exact = sum(line["prediction"] in line["references"] for line in lines)
    return f"{exact:,} of {len(lines):,} answered as a reference ({exact / len(lines):.1%}). "
