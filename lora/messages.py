"""Errors of bounded length, whatever a file holds; small tables for a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping


def brief(value: object, room: int = 120) -> str:
    """A value as Python writes it, in one line, cut in the middle to `room` characters."""
    try:
        text = " ".join(repr(value).split())
    except (RecursionError, ValueError):  # nested too deeply, or an integer of thousands of digits
        return f"a {type(value).__name__} too large to show"
    return cut(text, room)


def cut(text: object, room: int = 240) -> str:
    """A text, cut in the middle to `room` characters."""
    whole = str(text)
    half = (room - 1) // 2
    return whole if len(whole) <= room else f"{whole[:half]}…{whole[-half:]}"


def listed(parts: Iterable[str], sep: str = "; ", room: int = 1500) -> str:
    """The parts, each cut, as many as there is room for, and how many more there are."""
    every = list(parts)
    shown: list[str] = []
    for part in map(cut, every):
        room -= len(part) + len(sep)
        if room < 0:
            break
        shown.append(part)
    if more := len(every) - len(shown):
        shown.append(f"and {more} more")
    return sep.join(shown)


def html_table(rows: Mapping[str, object]) -> str:
    """A name and a value a line, for a notebook: what is in them stays text."""
    cells = ((html.escape(cut(name)), html.escape(cut(value))) for name, value in rows.items())
    lines = (f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in cells)
    return f"<table>{''.join(lines)}</table>"
