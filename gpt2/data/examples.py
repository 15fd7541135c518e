"""Examples as text, a prompt and a completion each, from the rows of any file."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from reprlib import repr as short
from typing import Any, TextIO

Fields = Mapping[str, str]
Rows = Iterator[tuple[str, Any]]  # a line's number; its columns, its JSON, or what is wrong
Range = tuple[float, float]
ALL: Range = (0.0, 1.0)
FORMS = (("text",), ("question", "answer"), ("prompt", "completion"))
SHOWN, LONGEST = 10, 180  # faulty rows that are listed, and characters of one
CELL = 2**31 - 1  # characters of a table's cell, the most that every C long counts


@dataclass(frozen=True)
class Example:
    """A text in two parts, of which the prompt need not be learnt."""

    prompt: str
    completion: str


def read_examples(
    path: str | Path, fields: Fields | None = None, *, prompts: bool = False
) -> list[Example]:
    """Read the examples of a file.

    A row has `text`, which is learnt as a whole; or `question` and `answer`, which become
    "Q: …\\nA:" and " …"; or `prompt` and `completion`, taken as they are.

    Args:
        path: JSON lines or a list (.jsonl, .json), .csv or .tsv with a heading, .parquet (pyarrow
            reads it), or plain text (.txt) with a blank line between documents.
        fields: the file's names for `text`, or for the two of a pair:
            `{"question": "frage", "answer": "antwort"}`.
        prompts: read what a model is to continue. A `text` is a prompt as it is, plain text has a
            prompt a line, and an answer or a completion may be missing. A row without `fields`
            is read by our names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: listing the first faulty rows as `file:line`, or the file has no examples.
        RuntimeError: a Parquet file, and no pyarrow to read it.
    """
    return list(stream_examples(path, fields, prompts=prompts))


def stream_examples(
    path: str | Path, fields: Fields | None = None, *, prompts: bool = False
) -> Iterator[Example]:
    """As `read_examples`, one at a time; faulty rows are left out, and raised at the end."""
    suffix = Path(path).suffix.lower()
    if suffix not in _READERS:
        raise ValueError(f"{path} has none of the endings that are read: {', '.join(_READERS)}.")
    newline = "" if suffix in (".csv", ".tsv") else None
    how: Any = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": newline}
    file = Path(path).open(**how)  # noqa: SIM115 - `_examples` closes it
    rows = (_READERS[suffix] or (_lines if prompts else _documents))(file)
    return _examples(file, rows, fields or {}, prompts)


def _examples(file: TextIO, rows: Rows, fields: Fields, prompts: bool) -> Iterator[Example]:
    """The examples of the good rows, until too many are faulty; then the faults."""
    faults: list[str] = []
    empty = True
    with file:
        for line, row in rows:
            empty = False
            try:
                yield _example(row, fields, prompts)
            except ValueError as error:
                faults.append(f"{file.name}{line}: {str(error)[:LONGEST]}")
                if len(faults) == SHOWN:
                    faults.append("the rest was not read")
                    break
    if faults:
        raise ValueError(f"{'; '.join(faults)}.")
    if empty:
        raise ValueError(f"{file.name} holds no examples.")


def is_within(example: Example, side: Range) -> bool:
    """Whether a hash of an example's prompt, or of a whole text, in [0, 1) is in this range."""
    digest = blake2b((example.prompt or example.completion).encode(), digest_size=8).digest()
    return side[0] * 2**64 <= int.from_bytes(digest, "little") < side[1] * 2**64


def within(examples: Iterable[Example], side: Range) -> Iterator[Example]:
    """The examples of a side, in their order; after the last a ValueError if there is none."""
    seen = kept = 0
    for example in examples:
        seen += 1
        if side == ALL or is_within(example, side):
            kept += 1
            yield example
    if seen and not kept:
        which = "to learn" if side[1] == 1 else "to evaluate on"
        raise ValueError(
            f"A share of {seen} examples, taken by a hash of their prompts, leaves none {which}: "
            "choose another share, or give a file."
        )


def _example(row: Any, fields: Fields, prompts: bool) -> Example:
    """The example that a row gives, or its prompt; a ValueError says why it gives none."""
    if isinstance(row, ValueError):
        raise row
    row = json.loads(row) if isinstance(row, str) else row
    columns: dict[Any, Any] = row if isinstance(row, dict) else {}
    lacking = [key for key in fields.values() if key not in columns]
    if lacking and columns and not prompts:
        raise ValueError(f"has no {short(lacking[0])}, only {short(sorted(map(str, columns)))}")
    columns = {name: columns[key] for name, key in fields.items() if key in columns} or columns
    # The second column of a prompt may be missing, or empty.
    forms = [form for form in FORMS if columns.keys() >= {*(form[:1] if prompts else form)}]
    if len(forms) != 1:
        given = sorted(map(str, columns)) if isinstance(row, dict) else row
        raise ValueError(
            "wants 'text', or 'question' and 'answer', or 'prompt' and 'completion', one of these "
            f"alone (name yours by fields), got {short(given)}"
        )
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
                yield f":{number}", line
        return
    try:
        items = json.loads(file.read())
    except ValueError as error:
        yield "", error
    else:
        for number, item in enumerate(items, 1):
            yield f", item {number}", {"text": item} if isinstance(item, str) else item


def _table(file: TextIO) -> Rows:
    """The rows of a .csv or .tsv under its heading, each with the line that ends it."""
    csv.field_size_limit(CELL)
    dialect = "excel-tab" if file.name.lower().endswith(".tsv") else "excel"
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
        yield f":{rows.line_num + 1}", ValueError(f"not CSV ({error})")


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
