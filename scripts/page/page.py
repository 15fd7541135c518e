"""A run's `report.html`, one file that loads nothing: its template is page.html.j2."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from ..runs import folder
from . import charts, sections
from .read import Record, read

HERE = Path(__file__).resolve().parent
GENERATOR = "lora-gpt2 report"
SCALE = {"−4": -4.0, "−2": -2.0, "0": 0.0, "+2": 2.0, "+4": 4.0}  # nats, as the passage's colours


def write(place: Path) -> None:
    """Write the report of a run's folder into it, and its losses as a picture beside it."""
    record = read(place)
    folder.write_whole(place / folder.REPORT, html([record]))
    if record.board:
        from . import searched  # which most runs do not need

        rates = [chart for chart in searched.over_each(record) if chart.title == "lr"]
        charts.png([searched.by_rung(record), *rates], place / folder.SEARCH_PLOT)
    elif record.steps:
        charts.png([sections.loss(record)], place / folder.PLOT)


def is_ours(file: Path) -> bool:
    """Whether a file is a report, and may be written anew."""
    with file.open("rb") as stream:
        return GENERATOR.encode() in stream.read(500)


def html(records: Sequence[Record]) -> str:
    """The page of one run, or of several side by side."""
    drawn: list[charts.Chart] = []

    def draw(chart: charts.Chart) -> dict[str, Any] | None:
        drawn.append(chart)
        return chart.drawing()

    style, script = ((HERE / f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    values: dict[str, Any] = {**vars(sections)}
    if any(record.board for record in records):
        from . import searched

        values |= vars(searched)
    values |= {
        "records": records,
        "draw": draw,
        "numbers": lambda: {chart.name: chart.numbers() for chart in drawn},
        "scale": {name: sections.colour(nats) for name, nats in SCALE.items()},
        "generator": GENERATOR,
        "digest": b64encode(sha256(script.encode()).digest()).decode(),
        "style": Markup(style),
        "script": Markup(script),
    }
    how = {"trim_blocks": True, "lstrip_blocks": True, "finalize": _visible}
    made = Environment(loader=FileSystemLoader(HERE), autoescape=True, **how)
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False}
    return made.get_template("page.html.j2").render(values)


def _visible(value: object) -> object:
    """Text, with what no HTML may hold made visible; spaces of all kinds stay."""
    if isinstance(value, Markup) or not isinstance(value, str) or value.isprintable():
        return value
    kept = {c for c in value if c.isprintable() or c in "\n\t" or (c.isspace() and c > "\x1f")}
    return "".join(c if c in kept else f"\\x{ord(c):02x}" for c in value)
