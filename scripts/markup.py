"""HTML from Python: what is no `Markup` is text, so that text of data or models stays text."""

from __future__ import annotations

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


def table(headings: list[str], rows: list[list[str]], **attributes: object) -> Markup:
    """A table in a frame that scrolls where it is too wide; cells of numbers stand right."""
    head = tag("tr", *(tag("th", heading, scope="col") for heading in headings))
    body = [tag("tr", *(tag("td", cell, class_=_kind(cell)) for cell in row)) for row in rows]
    made = tag("table", tag("thead", head), tag("tbody", *body), **attributes)
    return tag("div", made, class_="wide")


def _kind(cell: str) -> str | None:
    """Numbers are aligned."""
    bare = cell.replace(",", "").rstrip(" %s")
    return "n" if not isinstance(cell, Markup) and bare.lstrip("+−-")[:1].isdigit() else None
