"""Examples as text, a prompt and a completion each, from the rows of any file.

Rows come one at a time, each with its line. A row that cannot be read is a ValueError.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from reprlib import repr as short
from typing import Any, TextIO

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


def read_examples(path: str | Path, fields: Fields | None = None) -> list[Example]:
    """Read the examples of a file.

    A row has `text`, which is learnt as a whole; or `question` and `answer`, which become
    "Q: …\\nA: …"; or `prompt` and `completion`, taken as they are. Other columns do not matter.

    Args:
        path: JSON lines or a list (.jsonl, .json), .csv or .tsv with a heading, .parquet (pyarrow
            reads it), or plain text (.txt) with a blank line between documents.
        fields: the file's names for `text`, or for the two of a pair:
            `{"question": "frage", "answer": "antwort"}`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: listing the faulty rows as `file:line`, or there is none at all.
        RuntimeError: a Parquet file, and no pyarrow to read it.
    """
    return list(stream_examples(path, fields))


def stream_examples(path: str | Path, fields: Fields | None = None) -> Iterator[Example]:
    """As `read_examples`, one at a time; faulty rows are left out, and raised after the last."""
    return examples_in(opened(path), fields)


def read_prompts(path: str | Path, fields: Fields | None = None) -> list[Example]:
    """Read what a model is to continue; a completion here is a reference, "" where there is none.

    Args:
        path: as for `read_examples`, but plain text has a prompt a line, and an answer or a
            completion may be missing. A `text` is a prompt as it is.
        fields: as for `read_examples`; a row without them is read by our names.

    Errors are those of `read_examples`.
    """
    return list(examples_in(opened(path), fields, prompts=True))


def opened(path: str | Path) -> TextIO:
    """A file as text, in which `_value` refuses what is not UTF-8."""
    suffix = Path(path).suffix.lower()
    if suffix not in _READERS:
        raise ValueError(f"{path} has none of the endings that are read: {', '.join(_READERS)}.")
    newline = "" if suffix in (".csv", ".tsv") else None
    return Path(path).open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def examples_in(file: TextIO, fields: Fields | None, prompts: bool = False) -> Iterator[Example]:
    """The examples of an open file's good rows, or its prompts; then the faults of the others."""
    faults: list[str] = []
    left_out = number = 0
    text = _lines if prompts else _documents
    with file:
        for line, row in (_READERS[Path(file.name).suffix.lower()] or text)(file):
            try:
                example = _example(row, fields or {}, prompts)
            except ValueError as error:
                left_out += 1
                faults += [f"{file.name}{line}: {str(error)[:LONGEST]}"] * (left_out <= SHOWN)
            else:
                number += 1
                yield example
    if faults:
        more = f"; and {left_out - SHOWN} more" * (left_out > SHOWN)
        raise ValueError(f"{'; '.join(faults)}{more}.")
    if not number:
        raise ValueError(f"{file.name} holds no examples.")


def _example(row: Any, fields: Fields, prompts: bool) -> Example:
    """The example that a row gives, or its prompt; a ValueError says why it gives none."""
    if isinstance(row, ValueError):
        raise row
    columns: dict[Any, Any] = row if isinstance(row, dict) else {}
    lacking = [key for key in fields.values() if key not in columns]
    if lacking and columns and not prompts:
        raise ValueError(f"has no {short(lacking[0])}, only {short(sorted(map(str, columns)))}")
    columns = {name: columns[key] for name, key in fields.items() if key in columns} or columns
    # The second column of a prompt may be missing, or empty.
    forms = [form for form in FORMS if columns.keys() >= {*(form[:1] if prompts else form)}]
    if len(forms) != 1:
        wanted = "wants 'text', or 'question' and 'answer', or 'prompt' and 'completion' "
        wanted += "(or name yours by fields)"
        many = "has more than one form of an example: say which by fields"
        given = sorted(map(str, columns)) if isinstance(row, dict) else row
        raise ValueError(f"{many if forms else wanted}, got {short(given)}")
    form = forms[0][:1] if prompts and not columns.get(forms[0][-1]) else forms[0]
    first, *rest = [_value(columns, name, form) for name in form]
    if form == ("text",):
        return Example(first, "") if prompts else Example("", first)
    if form[0] == "question":
        first, rest = f"Q: {first}\nA:", [f" {answer}" for answer in rest]
    return Example(first, "".join(rest))


def _value(row: Mapping[str, Any], name: str, form: tuple[str, ...]) -> str:
    """A row's text in this column, not blank; but a pair's prompt may be empty."""
    if not isinstance(value := row[name], str):
        raise ValueError(f"{name!r} is {short(value)}, not a string")
    if not value.strip() and (name != "prompt" or len(form) == 1):
        raise ValueError(f"{name!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can escape too
        raise ValueError(f"{name!r} is not UTF-8: {short(value)}") from None
    return value


def _lines(file: TextIO) -> Rows:
    """The lines that are not blank."""
    for number, line in enumerate(file, 1):
        if line.strip():
            yield f":{number}", {"text": line.rstrip("\n")}


def _documents(file: TextIO) -> Rows:
    """The documents of a plain text, between which a blank line stands."""
    for blank, lines in groupby(enumerate(file, 1), lambda line: not line[1].strip()):
        if not blank:
            numbers, texts = zip(*lines, strict=True)
            yield f":{numbers[0]}", {"text": "".join(texts).rstrip("\n")}


def _json_rows(file: TextIO) -> Rows:
    """An object a line, or the items of a list, which is read whole."""
    start = file.read(4096).lstrip()
    file.seek(0)
    if not start.startswith("["):
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f":{number}", _json(line)
    elif isinstance(items := _json(file.read()), ValueError):
        yield "", items
    else:
        for number, item in enumerate(items, 1):
            yield f", item {number}", {"text": item} if isinstance(item, str) else item


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON in UTF-8 ({error})")


def _table(file: TextIO) -> Rows:
    """The rows of a .csv or .tsv under its heading, each with the line that ends it."""
    limit, kind = csv.field_size_limit(CELL), Path(file.name).suffix.lower()
    dialect = "excel-tab" if kind == ".tsv" else "excel"
    rows: Any = csv.DictReader(file, dialect=dialect, strict=True)
    try:
        heading = rows.fieldnames or [""]
        if len(heading) == 1 and ";" in heading[0]:
            fault = f"one column, {short(heading[0])}: cells seem to be separated by ';'"
            yield ":1", ValueError(f"{fault}; a .csv takes commas, a .tsv tabs")
            return
        for row in rows:
            if None in row or None in row.values():
                row = ValueError(f"has more or fewer cells than the heading's {len(heading)}")
            yield f":{rows.line_num}", row
    except csv.Error as error:  # nothing tells where the next row begins
        yield f":{rows.line_num + 1}", ValueError(f"not a {kind} ({error})")
    finally:
        csv.field_size_limit(limit)


def _parquet(file: TextIO) -> Rows:
    try:
        from pyarrow import parquet
    except ImportError:
        raise RuntimeError("To read Parquet: pip install 'lora-gpt2[parquet]'.") from None
    parts = parquet.ParquetFile(file.name).iter_batches(batch_size=1024)
    for number, row in enumerate((row for part in parts for row in part.to_pylist()), 1):
        yield f", row {number}", row


# By a file's ending; plain text is read as documents or as lines.
_READERS: dict[str, Callable[[TextIO], Rows] | None] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
    ".txt": None,
    ".md": None,
}
