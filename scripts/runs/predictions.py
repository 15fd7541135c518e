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

from . import folder
from .data import Prompt

AGAIN = "Name another --output, or pass --overwrite true."


def digest(files: Iterable[Path]) -> str:
    """A fingerprint of these files' bytes."""
    parts = [hashlib.sha256(file.read_bytes()).digest() for file in files]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


@contextmanager
def begun(file: Path, made: Mapping[str, Any], *, overwrite: bool) -> Iterator[int]:
    """Have the file for oneself and append to it; gives how many prompts it answers already.

    A ValueError where it was made with something else, and nothing allows to overwrite it.
    """
    record = file.with_name(f"{file.name}.made.json")
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is not this script's, for it is no file. {AGAIN}")
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        file.touch()
    with folder.locked(file, option="--output"):
        if overwrite or not file.stat().st_size:
            os.truncate(file, 0)
            folder.write_whole(record, json.dumps(made, indent=2))
        else:
            _check(file, record, made)
        yield sum(1 for _ in _lines(file))


def _check(file: Path, record: Path, made: Mapping[str, Any]) -> None:
    if not record.is_file():
        raise ValueError(f"{file} is not this script's, for {record.name} is missing. {AGAIN}")
    before = json.loads(record.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(made))  # as it is read back
    if odd := sorted(k for k in {*now, *before} if now.get(k) != before.get(k)):
        differ = ", ".join(f"{k} {before.get(k)!r:.60} (now {now.get(k)!r:.60})" for k in odd)
        raise ValueError(f"{file} was made with other options: {differ}. {AGAIN}")


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
def counted(file: Path, total: int) -> Iterator[None]:
    """Whatever stops the work says how much of it is in the file."""
    try:
        yield
    except BaseException as stop:
        done = sum(1 for _ in _lines(file))
        stop.add_note(
            f"{done:,} of {total:,} prompts are answered in {file}; "
            "the same command goes on from there."
        )
        raise


def append(file: Path, prompts: Sequence[Prompt], texts: Sequence[str]) -> None:
    """Write some answers after those that are there."""
    lines = [
        {"prompt": prompt.text, "prediction": text}
        | ({"references": list(prompt.references)} if prompt.references else {})
        for prompt, text in zip(prompts, texts, strict=True)
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
