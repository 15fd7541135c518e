"""Examples as text, a prompt and a completion each, from the rows of any file.

Rows come one at a time, each with its place (`file:line`), so that a file may be larger than
memory, and faults are listed together. A row that cannot be read is the ValueError that says why.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from reprlib import repr as short
from typing import IO, Any

Fields = Mapping[str, str]
Rows = Iterator[tuple[str, Any]]
FORMS = (("text",), ("question", "answer"), ("prompt", "completion"))
SHOWN, LONGEST = 10, 180  # faults that are listed one by one, and characters of one
CELL = 2**31 - 1  # characters of a table's cell, the most that every C long counts


@dataclass(frozen=True)
class Example:
    """A text in two parts, of which the prompt need not be learnt."""

    prompt: str
    completion: str


def from_texts(texts: Iterable[str]) -> Iterator[Example]:
    """Examples that are learnt as a whole."""
    if isinstance(texts, str):
        raise ValueError(f"texts is one string, {texts[:20]!r}…: give a list of them.")
    return (Example("", text) for text in texts)


def read_examples(path: str | Path, fields: Fields | None = None) -> list[Example]:
    """Read the examples of a file.

    A row has `text`, which is learnt as a whole; or `question` and `answer`, which become
    "Q: …\\nA: …"; or `prompt` and `completion`, taken as they are. Other columns do not matter.

    Args:
        path: JSON lines (.jsonl), a list (.json), .csv or .tsv with a heading, .parquet (pyarrow
            reads it), or plain text (.txt) with a blank line between documents.
        fields: the file's own names for `text`, or for the two of a pair:
            `{"question": "frage", "answer": "antwort"}`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: listing the faulty rows as `file:line`, or there is none at all.
        RuntimeError: a Parquet file, and no pyarrow to read it.
    """
    return list(stream_examples(path, fields))


def stream_examples(path: str | Path, fields: Fields | None = None) -> Iterator[Example]:
    """As `read_examples`, one at a time; faulty rows are left out, and raised after the last."""
    check(path, fields)
    return (example for file in _opened(path) for example in examples_in(file, fields))


def read_prompts(path: str | Path, fields: Fields | None = None) -> list[Example]:
    """Read what a model is to continue; a completion here is a reference, "" where there is none.

    Args:
        path: as for `read_examples`, but plain text has a prompt a line, and an answer or a
            completion may be missing. A `text` is a prompt as it is.
        fields: as for `read_examples`; a row without them is read by our names.

    Errors are those of `read_examples`.
    """
    check(path, fields, ("question",), ("prompt",))
    return [example for file in _opened(path) for example in examples_in(file, fields, True)]


def check(path: str | Path, fields: Fields | None, *more: tuple[str, ...]) -> None:
    """Raise what can be known without reading: no file, another format, names of no form."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing or no file.")
    if Path(path).suffix.lower() not in _READERS:
        raise ValueError(f"{path} has none of the endings that are read: {', '.join(_READERS)}.")
    if fields is not None and {*fields} not in [{*form} for form in (*FORMS, *more)]:
        raise ValueError(
            "fields gives a file's names for 'text', for 'question' and 'answer', or for 'prompt' "
            f"and 'completion', got {short(fields)}."
        )


def _opened(path: str | Path) -> Iterator[IO[bytes]]:
    with Path(path).open("rb") as file:
        yield file


def examples_in(file: IO[bytes], fields: Fields | None, prompts: bool = False) -> Iterator[Example]:
    """The examples of an open file's good rows, or its prompts; then the faults of the others."""
    faults, left_out, number = list[str](), 0, 0
    text = _lines if prompts else _documents
    for place, row in (_READERS[Path(file.name).suffix.lower()] or text)(file):
        try:
            example = _example(row, fields, prompts)
        except ValueError as error:
            left_out += 1
            faults += [f"{place}: {str(error)[:LONGEST]}"] * (left_out <= SHOWN)
        else:
            number += 1
            yield example
    if faults:
        more = f"; and {left_out - SHOWN} more" * (left_out > SHOWN)
        raise ValueError(f"{'; '.join(faults)}{more}.")
    if not number:
        raise ValueError(f"{file.name} holds no examples.")


def _example(row: Any, fields: Fields | None, prompts: bool) -> Example:
    """The example that a row gives, or its prompt; a ValueError says why it gives none."""
    if isinstance(row, ValueError):
        raise row
    names = {*row} if isinstance(row, dict) else set[Any]()
    lacking = [key for key in (fields or {}).values() if key not in names]
    if lacking and names and not prompts:
        raise ValueError(f"has no {short(lacking[0])}, only {short(sorted(map(str, names)))}")
    if fields and ({*fields.values()} - {*lacking} if prompts else names):
        row = {name: row.get(key) for name, key in fields.items()}
        names = {*row}
    forms = [form for form in FORMS if {*form} <= names]
    if prompts:  # whose second column may be missing, or empty
        forms = forms or [form for form in FORMS if form[0] in names]
        forms = [form[:1] if row.get(form[-1]) in (None, "") else form for form in forms]
    if len(forms) != 1:
        wanted = "wants 'text', or 'question' and 'answer', or 'prompt' and 'completion' (or say "
        wanted += "by fields what yours are called)"
        many = "has more than one form of an example: say which by fields"
        given = sorted(map(str, row)) if isinstance(row, dict) else row
        raise ValueError(f"{many if forms else wanted}, got {short(given)}")
    first, *rest = [_value(row, name, forms[0]) for name in forms[0]]
    if forms[0] == ("text",):
        return Example(first, "") if prompts else Example("", first)
    if forms[0][0] == "question":
        first, rest = f"Q: {first}\nA:", [f" {answer}" for answer in rest]
    return Example(first, "".join(rest))


def _value(row: Mapping[str, Any], name: str, form: tuple[str, ...]) -> str:
    """A row's text in this column, which says something; but a pair's prompt may be empty."""
    if not isinstance(value := row[name], str):
        raise ValueError(f"{name!r} is {short(value)}, not a string")
    if not value.strip() and (name != "prompt" or len(form) == 1):
        raise ValueError(f"{name!r} is empty")
    value.encode()  # refuses half a surrogate pair, which JSON can escape
    return value


# The rows of each format.


def _decoded(line: bytes) -> Any:
    try:
        return line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 ({error.reason} at byte {error.start})")


def _json(text: bytes) -> Any:
    decoded = _decoded(text)
    try:
        return json.loads(decoded) if isinstance(decoded, str) else decoded
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON ({error})")


def _numbered(file: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    return ((f"{file.name}:{number}", line) for number, line in enumerate(file, 1))


def _json_lines(file: IO[bytes]) -> Rows:
    return ((place, _json(line)) for place, line in _numbered(file) if line.strip())


def _json_list(file: IO[bytes]) -> Rows:
    """The items of a JSON list, which is read whole; many a .json has an object a line instead."""
    start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    if not start.startswith(b"["):
        yield from _json_lines(file)
    elif isinstance(items := _json(file.read()), ValueError):
        yield file.name, items
    else:
        for number, item in enumerate(items, 1):
            yield f"{file.name}, item {number}", {"text": item} if isinstance(item, str) else item


def _lines(file: IO[bytes]) -> Rows:
    """The lines of a plain text that are not blank."""
    for place, line in _numbered(file):
        text = _decoded(line)
        if isinstance(text, ValueError) or text.strip():
            yield place, {"text": text} if isinstance(text, str) else text


def _documents(file: IO[bytes]) -> Rows:
    """The documents of a plain text, between which a blank line stands."""
    begin, kept = "", list[str]()
    for place, line in chain(_numbered(file), [("", b"")]):
        text = _decoded(line)
        if isinstance(text, str) and text.strip():
            begin = begin if kept else place
            kept.append(text)
            continue
        if kept:
            yield begin, {"text": "\n".join(kept)}
            kept = []
        if isinstance(text, ValueError):
            yield place, text


def _table(file: IO[bytes]) -> Rows:
    """The rows of a .csv or .tsv under its heading."""
    limit, kind = csv.field_size_limit(CELL), Path(file.name).suffix[1:].upper()
    text = (line.decode("utf-8-sig" if n == 0 else "utf-8") for n, line in enumerate(file))
    rows = csv.reader(text, "excel-tab" if kind == "TSV" else "excel", strict=True)
    line, heading = 1, list[str]()
    try:
        for row in rows:
            place, line = f"{file.name}:{line}", rows.line_num + 1
            if not heading and len(row) == 1 and ";" in row[0]:
                said = f"one column, {short(row[0])}: cells seem to be separated by ';'"
                yield place, ValueError(f"{said}; a .csv takes commas, a .tsv tabs")
                return
            if row and heading and len(row) != len(heading):
                yield place, ValueError(f"{len(row)} cells under a heading of {len(heading)}")
            elif row and heading:
                yield place, dict(zip(heading, row, strict=True))
            heading = heading or row
    except (UnicodeDecodeError, csv.Error) as error:  # nothing tells where the next row begins
        reason = getattr(error, "reason", error)
        yield f"{file.name}:{line}", ValueError(f"not {kind} in UTF-8 ({reason})")
    finally:
        csv.field_size_limit(limit)


def _parquet(file: IO[bytes]) -> Rows:
    try:
        from pyarrow import parquet
    except ImportError:
        raise RuntimeError("To read Parquet: pip install 'lora-gpt2[parquet]'.") from None
    try:
        parts = parquet.ParquetFile(file.name).iter_batches(batch_size=1024)
        for number, row in enumerate((row for part in parts for row in part.to_pylist()), 1):
            yield f"{file.name}, row {number}", row
    except (OSError, ValueError) as error:  # as pyarrow raises them
        yield file.name, ValueError(f"not Parquet ({error})")


# By a file's ending; plain text is read as documents or as lines.
_READERS: dict[str, Callable[[IO[bytes]], Rows] | None] = {
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
    ".txt": None,
    ".md": None,
}
