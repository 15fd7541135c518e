"""HTML from Python: what is no `Markup` is text, so that text of data or models stays text."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

VOID = {"meta", "br", "link"}


class Markup(str):
    """HTML as it stands."""

    __slots__ = ()


def tag(name: str, /, *inside: str, **attributes: object) -> Markup:
    """An element; `class_` is `class`, `data_x` is `data-x`, None is left out."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    said = "".join(
        f' {key}="{escape(str(value))}"' for key, value in given.items() if value is not None
    )
    return Markup(f"<{name}{said}>" + ("" if name in VOID else f"{joined(*inside)}</{name}>"))


def joined(*parts: str) -> Markup:
    """Parts after one another; those that are text are escaped."""
    return Markup("".join(part if isinstance(part, Markup) else text(part) for part in parts))


def text(said: str) -> Markup:
    """Text, with what no HTML may hold made visible."""
    kept = "".join(c if c.isprintable() or c in "\n\t" else visible(c) for c in said)
    return Markup(escape(kept, quote=False))


def visible(character: str) -> str:
    """A character that is not printed, as it is or as its code: spaces of all kinds stay."""
    return character if character.isspace() and ord(character) > 31 else f"\\x{ord(character):02x}"


def table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], best: int | None = None
) -> Markup:
    """A table in a frame that scrolls where it is too wide; columns of numbers stand right.

    Args:
        headings, rows: its cells.
        best: the number of the row that stands out.
    """
    columns = list(zip(*rows, strict=True)) or [()] * len(headings)
    kinds = ["n" if all(map(_is_number, cells)) else None for cells in columns]
    heads = [tag("th", said, class_=kind) for said, kind in zip(headings, kinds, strict=True)]
    body = [
        tag("tr", *(tag("td", c, class_=kind) for c, kind in zip(row, kinds, strict=True)),
            class_="best" if i == best else None)
        for i, row in enumerate(rows)
    ]  # fmt: skip
    made = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *body))
    return tag("div", made, class_="wide", tabindex=0)


def _is_number(cell: str) -> bool:
    return not cell or cell == "not finite" or cell.lstrip("+−-")[:1].isdigit()
