"""A run's `report.html`, one file that loads nothing: its template is page.html.j2."""

from __future__ import annotations

import math
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from ..runs import folder
from . import charts
from .charts import UNIT, Chart, Points, Series, finite, means, number, thinned
from .read import Record, Row, read

HERE = Path(__file__).resolve().parent
GENERATOR = "lora-gpt2 report"
MOST, STRONGEST = 4.0, 0.45  # nats of the full colour; its opacity
Colour = tuple[str, str]  # its name, its opacity


def write(root: Path) -> Record:
    """Write the report of a run's folder into it, and a picture of its losses."""
    record = read(root)
    folder.write_whole(root / folder.REPORT, html([record]))
    if record.board:
        from . import searched  # which most runs do not need

        rates = [chart for chart in searched.over_each(record) if chart.title == "lr"]
        charts.png([searched.by_rung(record), *rates], root / folder.SEARCH_PLOT)
    elif record.steps:
        charts.png([loss(record)], root / folder.PLOT)
    return record


def is_ours(file: Path) -> bool:
    """Whether a file is a report, and may be written anew."""
    with file.open("rb") as stream:
        return GENERATOR.encode() in stream.read(500)


def html(records: Sequence[Record]) -> str:
    """The page of one run, or of several side by side."""
    drawn: list[Chart] = []

    def draw(chart: Chart) -> dict[str, Any] | None:
        drawn.append(chart)
        return chart.drawing()

    style, script = ((HERE / f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    values: dict[str, Any] = {**vars(charts), **globals(), "records": records}
    if any(record.board for record in records):
        from . import searched

        values |= vars(searched)
    values |= {
        "draw": draw,
        "numbers": lambda: {chart.name: chart.numbers() for chart in drawn},
        "digest": b64encode(sha256(script.encode()).digest()).decode(),
        "style": Markup(style),
        "script": Markup(script),
    }
    loader = FileSystemLoader(HERE)
    made = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False}
    return made.get_template("page.html.j2").render(values)


def compared(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """The losses of several runs, and the options in which they differ."""
    options = [flat(record.options) for record in records]
    names = [n for n in dict.fromkeys(n for o in options for n in o) if n != "res_path"]
    differ = [n for n in names if len({o.get(n) for o in options}) > 1]
    rows: list[list[str]] = []
    for record, values in zip(records, options, strict=True):
        last = number(record.steps[-1]["loss"]) if record.steps else ""
        best = number(record.best_loss) if record.validation else ""
        losses = [record.name, str(len(record.steps)), last, best]
        rows.append([*losses, *(values.get(n, "") for n in differ)])
    return ["run", "steps", "last loss", "held-out loss", *differ], rows


def overlaid(records: Sequence[Record]) -> Chart:
    """The loss of each of several runs."""
    series: list[Series] = []
    for i, record in enumerate(records):
        points, few = _losses(record)
        line = means(points, few) if len(finite(points)) == len(points) else thinned(points)
        series.append(Series(name=record.name, points=line, color=str(i % 6 + 1)))
    return Chart(name="compared", title="Loss", unit=f"{UNIT}, smoothed", series=series)


def loss(run: Record) -> Chart:
    """The loss of each step, its mean, and that on validation data."""
    points, few = _losses(run)
    series = [Series(name="each step", points=thinned(points), look="faint")]
    if few > 1:
        series.append(Series(name=f"mean of {few} steps", points=means(points, few)))
    if held_out := list(run.validation.items()):
        series.append(Series(name="held-out", points=held_out, look="both", color="2"))
    best = run.best_step
    marks = [] if best is None else [(best, f"best: step {best:,}")]
    return Chart(name=f"loss {run.name}", title="Loss", unit=UNIT, marks=marks, series=series)


def _losses(run: Record) -> tuple[Points, int]:
    return [(s["step"], s["loss"]) for s in run.steps], max(1, len(run.steps) // 40)


def over_steps(run: Record, key: str, title: str) -> Chart:
    """What the metrics have under a key."""
    line = Series(name="", points=thinned([(s["step"], s[key]) for s in run.steps]))
    return Chart(name=f"{key} {run.name}", title=title, log_y=False, series=[line])


def mean_change(passage: Row) -> str:
    """How many nats a token is likelier under the adapter, in the mean."""
    pairs = zip(passage["base"], passage["adapter"], strict=True)
    known = [change for b, a in pairs if math.isfinite(change := a - b)] or [math.nan]
    return f"{sum(known) / len(known):+.3f}".replace("-", "−")


def tokens(passage: Row) -> list[tuple[str, str, Colour]]:
    """Each token's text, its numbers, its colour."""
    first, *others = passage["tokens"]
    rows = [(first, "", colour(0))]
    for piece, b, a in zip(others, passage["base"], passage["adapter"], strict=True):
        title = f"{piece.strip() or 'space'} · base {b:.2f}, adapter {a:.2f}: {a - b:+.2f} nats"
        rows.append((piece, title.replace("-", "−"), colour(a - b)))
    return [row for row in rows if row[0]]


def colour(value: float, most: float = MOST) -> Colour:
    """The colour of a change, or of a share."""
    share = min(1.0, abs(value) / most) * STRONGEST if math.isfinite(value) else 0.0
    return "lose" if value < 0 else "gain", f"{share:.2f}"


def heat(updates: Sequence[Row]) -> tuple[list[str], dict[str, dict[str, tuple[str, str, Colour]]]]:
    """Each update's size as a share of its weight's, by layer and target."""
    shares = [u["update"] / u["weight"] if u["weight"] else math.nan for u in updates]
    most = max(filter(math.isfinite, shares), default=0) or 1.0
    cells: dict[str, dict[str, tuple[str, str, Colour]]] = {}
    for row, share in zip(updates, shares, strict=True):
        at = re.fullmatch(r"(?:.*\.)?(\d+)\.(.+)", row["layer"])
        layer, target = at.groups() if at else (row["layer"], "update")
        text = f"{100 * share:.3g} %" if math.isfinite(share) else "not finite"
        title = f"‖s·BA‖ {row['update']:g}, ‖W‖ {row['weight']:g}"
        cells.setdefault(layer, {})[target] = (text, title, colour(share, most))
    return list(dict.fromkeys(target for row in cells.values() for target in row)), cells


def flat(values: Row, before: str = "", only: Sequence[str] = ()) -> dict[str, str]:
    """Nested values by dotted names, all or those of some keys."""
    names: dict[str, str] = {}
    for key, value in values.items():
        if only and key not in only:
            continue
        if isinstance(value, Mapping) and value:
            names |= flat(value, f"{before}{key}.")
        else:
            names[f"{before}{key}"] = shown(value)
    return names


def shown(value: Any) -> str:
    """A value of an option."""
    if value is None or value == []:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(f"[{shown(v)}]" if isinstance(v, list) else shown(v) for v in value)
    return f"{value:,}" if isinstance(value, int) else str(value)
