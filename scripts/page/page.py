"""A run's `report.html`: its frame, its sections, its numbers; one file that asks for nothing."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..runs import folder
from . import searched, sections
from .charts import Chart
from .markup import Markup, joined, tag
from .record import Record, read

ASSETS = Path(__file__).resolve().parent / "assets"
MADE = "lora-gpt2 report"


def write(place: Path) -> Path:
    """Write the report of a run's folder into it."""
    return put(place / folder.REPORT, html([read(place)]))


def put(file: Path, page: str) -> Path:
    """Write a page, whole."""
    odd = "backslashreplace"  # a text may hold a surrogate, which no file can
    part = file.with_suffix(".part")
    try:
        part.write_text(page, encoding="utf-8", errors=odd)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return file


def is_ours(file: Path) -> bool:
    """Whether a file is a report, and may be written anew."""
    with file.open("rb") as found:
        return MADE.encode() in found.read(500)


def html(records: Sequence[Record]) -> str:
    """The page of one run, or of several side by side."""
    (first, *others) = records
    title = " · ".join(record.name for record in records)
    found = list(_found(first, others))
    parts = [part for _, _, parts in found for part in parts]
    charts = [c for p in parts for c in (p if isinstance(p, list) else [p]) if isinstance(c, Chart)]
    numbers = {chart.name: chart.numbers() for chart in charts}
    style, script = ((ASSETS / name).read_text("utf-8") for name in ("report.css", "report.js"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy(script)),
        tag("meta", name="generator", content=MADE),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title} · report"),
        tag("link", rel="icon", href="data:,"),  # or a browser asks for one
        tag("style", Markup(style)),
    )
    body = tag(
        "body",
        tag("main", sections.head(records), *_sections(found)),
        tag("script", Markup(as_json(numbers)), type="application/json", id="numbers"),
        tag("script", Markup(script)),
    )
    return f'<!doctype html>\n<html lang="en">{head}{body}</html>\n'


def policy(script: str) -> str:
    """What a browser may do: load nothing, and run no script but ours."""
    mark = b64encode(sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{mark}'"
    )


def as_json(value: Any) -> str:
    """JSON that cannot end the element it stands in."""
    said = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return said.replace("<", "\\u003c")


def _found(first: Record, others: Sequence[Record]) -> Iterator[sections.Section]:
    if others:
        yield from sections.compared([first, *others])
    else:
        yield from searched.sections_of(first)
        yield from sections.of(first)


def _sections(found: Sequence[sections.Section]) -> Iterator[Markup]:
    for title, note, parts in found:
        shown = map(_shown, parts)
        told = [tag("p", note, class_="note")] if note else []
        yield tag("section", tag("h2", title), *told, joined(*shown))


def _shown(part: sections.Part) -> Markup:
    if isinstance(part, list):
        return tag("div", *(chart.html() for chart in part), class_="two small")
    return part.html() if isinstance(part, Chart) else part
