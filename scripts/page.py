"""A page in one file: its frame, its style, its small script; all text on it is text."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from html import escape
from pathlib import Path
from typing import Any

ALIKE = 0.3  # of the words
ASSETS = Path(__file__).resolve().parent / "assets"


def page(title: str, body: str, data: Mapping[str, Any]) -> str:
    """The whole file. Nothing may be loaded, and no script may run but ours."""
    style, script = (
        (ASSETS / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")
    )
    mark = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{mark}'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>{style}</style></head><body>{body}"
        f'<script type="application/json" id="record">{embedded(data)}</script>'
        f"<script>{script}</script></body></html>\n"
    )


def embedded(data: Any) -> str:
    """JSON that ends no script element; what is no number in JSON is null."""
    text = json.dumps(plain(data), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def plain(value: Any) -> Any:
    """The same without NaN and infinities, which become null."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return list(map(plain, value)) if isinstance(value, list | tuple) else value


def text(value: object) -> str:
    """Text as text; bytes that are none stay visible."""
    return escape(str(value).encode("utf-8", "backslashreplace").decode("utf-8"))


def section(title: str, *parts: str, note: str = "") -> str:
    """A part of the page under its heading, or nothing if there is nothing to show."""
    if not any(parts):
        return ""
    told = f'<p class="note">{text(note)}</p>' if note else ""
    return f"<section><h2>{text(title)}</h2>{told}{''.join(parts)}</section>"


def tiles(pairs: Iterable[tuple[str, str]]) -> str:
    """Large figures with what they are."""
    cells = (f'<div class="tile"><b>{text(v)}</b><span>{text(k)}</span></div>' for k, v in pairs)
    return f'<div class="tiles">{"".join(cells)}</div>'


def pairs(rows: Mapping[str, Any]) -> str:
    """Names and values in columns."""
    cells = (f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in rows.items())
    return f"<dl>{''.join(cells)}</dl>"


def table(
    heads: Sequence[str], rows: Iterable[Sequence[Any]], *, first: bool = False, sort: bool = False
) -> str:
    """A table, numbers to the right; perhaps its first row is marked, or a head's click sorts."""
    mark, body = " data-sort" if sort else "", list[str]()
    number = list(map(list, rows))
    right = [all(isinstance(r[i], int | float) or r[i] is None for r in number) for i in
             range(len(heads))]  # fmt: skip
    kinds = [' class="n"' if r else "" for r in right]
    head = "".join(f"<th{k}{mark}>{text(h)}</th>" for h, k in zip(heads, kinds, strict=True))
    for n, row in enumerate(number):
        cells = (f"<td{k}>{cell(v)}</td>" for v, k in zip(row, kinds, strict=True))
        body.append(f"<tr{' class=win' if first and not n else ''}>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def cell(value: Any) -> str:
    """What a cell shows; the exact number where it is rounded."""
    if value is None:
        return ""
    if isinstance(value, float):
        brief = f"{value:.4g}"
        shown = brief if abs(value) < 1 or float(brief) == value else f"{value:.4f}"
        return shown if float(shown) == value else f'<span title="{value!r}">{shown}</span>'
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return text(value)


def changed(before: str, after: str, tag: str) -> str:
    """The second text, what is not in the first within `tag`, word by word.

    Of two texts that have little in common nothing is marked: all of it would be.
    """
    old, new = before.strip().split(" "), after.strip().split(" ")
    match, parts = SequenceMatcher(None, old, new, autojunk=False), list[str]()
    if match.ratio() < ALIKE:
        return text(after.strip())
    for kind, _, _, start, end in match.get_opcodes():
        words = text(" ".join(new[start:end]))
        if start < end:
            parts.append(words if kind == "equal" else f"<{tag}>{words}</{tag}>")
    return " ".join(parts)
