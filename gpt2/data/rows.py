"""Rows of a file, one at a time, whatever its format, each with its place: `file:line`.

A row is what its line holds, or the ValueError that says why it holds nothing, so that a reader
can list all faults at once. No row is kept, so that a file may be larger than memory.
"""

from __future__ import annotations

import csv
import json
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, cast

Rows = Iterator[tuple[str, object]]
_MARK = "\ufeff"  # that some editors begin a text with


def read_rows(path: str | Path, *, text: Callable[[Path], Rows]) -> Rows:
    """The rows of a file, each with its place; nothing is read before the first is asked for.

    Args:
        path: its suffix tells the format: .jsonl, .json, .csv, .tsv, .parquet, or .txt.
        text: how plain text falls into rows, `documents` or `lines`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the suffix is none of these.
        RuntimeError: a Parquet file, and no pyarrow to read it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing or no file.")
    readers = {**_READERS, ".txt": text, ".md": text}
    if (suffix := path.suffix.lower()) not in readers:
        raise ValueError(f"{path} has none of the endings that are read: {', '.join(readers)}.")
    if suffix == ".parquet":
        _parquet_module()
    return readers[suffix](path)


def documents(path: Path) -> Rows:
    """The documents of a plain text, between which a blank line stands."""
    place, kept = "", list[str]()
    for where, line in _text_lines(path):
        if isinstance(line, str) and line.strip():
            place = place if kept else where
            kept.append(line)
            continue
        if kept:
            yield place, {"text": "\n".join(kept)}
            kept = []
        if not isinstance(line, str):
            yield where, line
    if kept:
        yield place, {"text": "\n".join(kept)}


def lines(path: Path) -> Rows:
    """The lines of a plain text that are not blank."""
    for place, line in _text_lines(path):
        if not isinstance(line, str):
            yield place, line
        elif line.strip():
            yield place, {"text": line}


def _text_lines(path: Path) -> Iterator[tuple[str, str | ValueError]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            yield f"{path}:{number}", _decoded(line.removesuffix(b"\n").removesuffix(b"\r"))


def _decoded(line: bytes) -> str | ValueError:
    try:
        return line.decode().removeprefix(_MARK)
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 ({error.reason} at byte {error.start})")


def _json_lines(path: Path) -> Rows:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", _json(line.rstrip())


def json_part(path: Path, begin: int, end: int) -> tuple[list[tuple[int, object]], int]:
    """The rows of JSON whose lines begin at byte `begin` or after, and before `end`.

    Each has the number of its line among these, from 1; beside them stands how many lines there
    are.
    """
    rows, number = list[tuple[int, object]](), 0
    with path.open("rb") as file:
        if begin:  # a line that began before belongs to the part before
            file.seek(begin - 1)
            file.readline()
        at = file.tell()
        while at < end and (line := file.readline()):
            number, at = number + 1, at + len(line)
            if line.strip():
                rows.append((number, _json(line.rstrip())))
    return rows, number


def _json_list(path: Path) -> Rows:
    """The items of a JSON list, which is read whole; many a .json has an object a line instead."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        yield from _json_lines(path)
    elif isinstance(items := _json(path.read_bytes()), ValueError):
        yield str(path), items
    else:
        for number, item in enumerate(cast(list[object], items), 1):
            yield f"{path}, item {number}", {"text": item} if isinstance(item, str) else item


def _json(text: bytes) -> object:
    """What a JSON text holds, or what is wrong with it."""
    if isinstance(decoded := _decoded(text), ValueError):
        return decoded
    try:
        return _DECODER.decode(decoded)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        return ValueError(f"not JSON ({error.msg} at {line}column {error.colno})")
    except RecursionError:
        return ValueError("not JSON that can be read (nested too deep)")
    except ValueError as error:  # a key that stands twice, a number of too many digits
        return error


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {reprlib.repr(twice)} stands twice")
    return found


_OTHERS = {";", ",", "\t", "|"}  # that part cells in files of other programs
_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _table(path: Path) -> Rows:
    """The rows of a .csv or .tsv under its heading."""
    heading, begins = list[str](), 1
    with path.open("rb") as file:
        text = (line.decode("utf-8" if n else "utf-8-sig") for n, line in enumerate(file))
        rows = csv.reader(
            text, "excel-tab" if path.suffix.lower() == ".tsv" else "excel", strict=True
        )
        try:
            for row in rows:
                place, begins = f"{path}:{begins}", rows.line_num + 1
                if row and not heading:
                    heading = row
                    if len({*row}) < len(row):
                        yield place, ValueError(f"a column stands twice in {reprlib.repr(row)}")
                        return
                    if len(row) == 1 and (other := _OTHERS & {*row[0]}):
                        said = f"one column, {reprlib.repr(row[0])}: cells seem to be parted by"
                        yield (
                            place,
                            ValueError(f"{said} {min(other)!r}; a .csv takes commas, a .tsv tabs"),
                        )
                        return
                elif row and len(row) != len(heading):
                    yield place, ValueError(f"{len(row)} cells under a heading of {len(heading)}")
                elif row:
                    yield place, dict(zip(heading, row, strict=True))
        except (UnicodeDecodeError, csv.Error) as error:  # nothing tells where the next row begins
            reason = getattr(error, "reason", error)
            kind = path.suffix[1:].upper()
            yield f"{path}:{begins}", ValueError(f"not {kind} in UTF-8 ({reason})")


def _parquet(path: Path) -> Rows:
    number = count(1)
    try:
        with _parquet_module().ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{path}, row {next(number)}", row
    except (OSError, ValueError) as error:  # as pyarrow raises them
        yield str(path), ValueError(f"not Parquet ({str(error)[:200]})")


def _parquet_module() -> Any:
    try:
        from pyarrow import parquet  # pyright: ignore
    except ImportError:
        raise RuntimeError(
            "Reading Parquet takes pyarrow: pip install 'lora-gpt2[parquet]'."
        ) from None
    return parquet  # pyright: ignore


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
}
