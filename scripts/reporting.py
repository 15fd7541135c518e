"""The report of one run, of a search, or of several beside one another, as one file of HTML."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import page
import record as records
import searched
import sections
from charts import Line, thinned
from record import Record

REPORT = "report.html"


def html(found: Sequence[Record]) -> str:
    """The page of one record, or of several compared."""
    return _one(found[0]) if len(found) == 1 else _compared(found)


def write(place: Path) -> Path:
    """Write the report of a run into its folder, whole or not at all."""
    file = place / REPORT
    put(file, html([records.read(place)]))
    return file


def put(file: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _one(record: Record) -> str:
    charts: sections.Charts = {}
    if record.trials or record.run.get("kind") == "search":
        views = (searched.head, searched.tree, searched.parameters, searched.curves)
        body = "".join(view(record) for view in views) + searched.leaderboard(record)
    else:
        body = sections.head(record) + sections.answers(record)
        body += sections.curves(record, charts)
        body += _body(record)
        for part in record.parts:
            body += f"<h2>{page.text(part.name)}</h2>" + sections.curves(part, charts, part.name)
            body += _body(part)
    body += sections.commands(record) + sections.asked(record)
    data = {"run": record.run, "charts": charts}
    return page.page(f"{record.name} · lora-gpt2", body, data)


def _body(record: Record) -> str:
    return sections.tokens(record) + sections.updates(record) + sections.speed(record)


def _compared(found: Sequence[Record]) -> str:
    rows = [
        (r.place, "yes" if r.ended else "no", len(r.metrics), r.metrics[-1]["loss"]
         if r.metrics else None, r.best and r.best[1], r.best and r.best[0],
         *((r.config.get("lora") or {}).get(k) for k in ("r", "alpha")), r.config.get("lr"))
        for r in found
    ]  # fmt: skip
    heads = "run, ended, steps, last loss, best held-out loss, at step, r, alpha, lr".split(", ")
    body = f"<header><h1>{len(found)} runs compared</h1></header>"
    body += page.section("Runs", page.table(heads, rows, sort=True))
    charts: sections.Charts = {}
    for key, title in (("loss", "Training loss"), ("validation", "Held-out loss")):
        lines = [
            Line(name=r.name, style=f"c{n % sections.STYLES}",
                 points=thinned(r.held_out if key == "validation" else r.line("loss"), 100))
            for n, r in enumerate(found)
        ]  # fmt: skip
        lines = [line for line in lines if line.points]
        if lines:
            body += page.section(title, sections.chart(key, lines, charts))
    return page.page("runs compared · lora-gpt2", body, {"charts": charts})
