"""Examples as text, a prompt and a completion each, from the rows of any file."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from gpt2.data.rows import Rows, documents, lines, read_rows

SHOWN = 10  # faults that are listed one by one
LONGEST = 180  # characters of one
Fields = Mapping[str, str]
FORMS = (("text",), ("question", "answer"), ("prompt", "completion"))
_NAMES = [(form, frozenset(form)) for form in FORMS]


@dataclass(frozen=True)
class Example:
    """A text in two parts, of which the prompt need not be learnt."""

    prompt: str
    completion: str


def from_texts(texts: Iterable[str]) -> Iterator[Example]:
    """Examples that are learnt as a whole.

    Raises:
        ValueError: one string, whose letters would be examples.
    """
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
    check_fields(fields, complete=True)
    rows = read_rows(path, text=documents)
    return _checked(rows, path, lambda row: example_of(row, fields))


def read_prompts(path: str | Path, fields: Fields | None = None) -> list[Example]:
    """Read what a model is to continue; a completion here is a reference, "" where there is none.

    Args:
        path: as for `read_examples`, but plain text has a prompt a line, and an answer or a
            completion may be missing. A `text` is a prompt as it is.
        fields: as for `read_examples`; a row without them is read by our names.

    Raises:
        As `read_examples`.
    """
    check_fields(fields, complete=False)
    rows = read_rows(path, text=lines)
    return list(_checked(rows, path, lambda row: _prompt(row, fields)))


@dataclass
class Faults:
    """Rows that give no example: the first few are told of, all are counted."""

    told: list[tuple[str | int, str]] = field(default_factory=list[tuple[str | int, str]])
    left_out: int = 0
    found: int = 0  # examples of the other rows

    def check(self, path: str | Path) -> None:
        """Raise what was found after the last row.

        Raises:
            ValueError: listing the faulty rows; or there is no example at all.
        """
        if self.told:
            before = ["", *(said for _, said in self.told)]
            pairs = zip(self.told, before, strict=False)
            told = [f"{place}: {'likewise' if said == b else said}" for (place, said), b in pairs]
            listed = "; ".join(told)
            more = f"; and {self.left_out - SHOWN} more" if self.left_out > SHOWN else ""
            raise ValueError(f"{listed}{more}.")
        if not self.found:
            raise ValueError(f"{path} holds no examples.")


def good(
    rows: Iterable[tuple[str | int, object]], faults: Faults, make: Callable[[object], Example]
) -> Iterator[Example]:
    """The examples of the good rows; the others go to the faults."""
    for place, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            example = make(row)
        except ValueError as error:
            faults.left_out += 1
            if faults.left_out <= SHOWN:
                said = str(error)
                faults.told.append((place, said if len(said) <= LONGEST else said[:LONGEST] + "…"))
        else:
            faults.found += 1
            yield example


def _checked(rows: Rows, path: str | Path, make: Callable[[object], Example]) -> Iterator[Example]:
    faults = Faults()
    yield from good(rows, faults, make)
    faults.check(path)


def example_of(row: object, fields: Fields | None) -> Example:
    """The example that a row gives; a ValueError says why it gives none."""
    row = _renamed(row, fields)
    whole = [form for form, names in _NAMES if row.keys() >= names]
    if len(whole) != 1:
        raise ValueError(_wanted(row, len(whole)))
    values = _texts(row, whole[0])
    if whole[0] == ("text",):
        return Example("", values[0])
    return _pair(whole[0], *values)


def _prompt(row: object, fields: Fields | None) -> Example:
    row = _renamed(row, None)
    if fields and any(row.keys() >= {fields[name]} for name, *_ in FORMS if name in fields):
        row = {name: row.get(key) for name, key in fields.items()}
    begun = [form for form in FORMS if row.keys() >= {*form}]
    begun = begun or [form for form in FORMS if form[0] in row]
    if len(begun) != 1:
        raise ValueError(_wanted(row, len(begun)))
    form = begun[0][: 1 if row.get(begun[0][-1]) in (None, "") else 2]
    values = _texts(row, form)
    if not values[0].strip():
        raise ValueError(f"{form[0]!r} is empty")
    return _pair(form, *values)


def _pair(form: tuple[str, ...], prompt: str, completion: str = "") -> Example:
    if form[0] == "question":
        return Example(f"Q: {prompt}\nA:", f" {completion}" if completion else "")
    return Example(prompt, completion)


def _renamed(row: object, fields: Fields | None) -> dict[str, object]:
    """A row under our names."""
    if not isinstance(row, dict):
        raise ValueError(_wanted(row, 0))
    row = cast(dict[str, object], row)
    if not fields:
        return row
    if lacking := [key for key in fields.values() if key not in row]:
        raise ValueError(f"has no {reprlib.repr(lacking[0])}, only {_keys(row)}")
    return {name: row[key] for name, key in fields.items()}


def _texts(row: Mapping[str, object], form: tuple[str, ...]) -> list[str]:
    """The values of these columns, each a string that says something; a prompt may be empty."""
    values = [row[name] for name in form]
    for name, value in zip(form, values, strict=True):
        if not isinstance(value, str):
            raise ValueError(f"{name!r} is {reprlib.repr(value)}, not a string")
        if not value.strip() and not (name == "prompt" and len(form) == 2):
            raise ValueError(f"{name!r} is empty")
        value.encode()  # refuses half a surrogate pair, which JSON can escape
    return cast(list[str], values)


def _wanted(row: object, forms: int) -> str:
    found = _keys(cast(dict[str, object], row)) if isinstance(row, dict) else reprlib.repr(row)
    if forms > 1:
        return f"has more than one form of an example: say which by fields, got {found}"
    wanted = "wants 'text', or 'question' and 'answer', or 'prompt' and 'completion'"
    return f"{wanted} (or say by fields what yours are called), got {found}"


def _keys(row: Mapping[str, object]) -> str:
    return reprlib.repr(sorted(map(str, row)))


def check_fields(fields: Fields | None, *, complete: bool) -> None:
    """The error that these names for the columns give, if they are none."""
    if fields is None:
        return
    forms = [{*form} for form in FORMS] + ([] if complete else [{form[0]} for form in FORMS])
    for form in FORMS:
        if complete and isinstance(fields, Mapping) and {*fields} < {*form} and fields:  # pyright: ignore
            lacking = ", ".join(repr(name) for name in form if name not in fields)
            given = ", ".join(map(repr, fields))
            raise ValueError(
                f"fields gives a file's names for {given} and none for {lacking}: give it too."
            )
    if not isinstance(fields, Mapping) or {*fields} not in forms:  # pyright: ignore
        raise ValueError(
            "fields gives a file's names for 'text', for 'question' and 'answer', or for 'prompt' "
            f"and 'completion', got {reprlib.repr(fields)}."
        )
