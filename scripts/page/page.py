"""A run's report.html, from page.html.j2: one file that loads nothing."""

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from ..runs import folder
from . import charts
from .charts import UNIT, Chart, Points, Series, finite, means, thinned
from .read import Record, Row, read

HERE = Path(__file__).resolve().parent
GENERATOR = "lora-gpt2 report"
MOST, STRONGEST = 4.0, 0.45  # nats; opacity
Colour = tuple[str, str]  # name, opacity
Cells = dict[str, dict[str, tuple[str, str, Colour]]]  # text, title


def write(root: Path) -> None:
    """Write a run's report and a picture of its losses."""
    record = read(root)
    folder.write_whole(root / folder.REPORT, html([record]))
    if record.board:
        from . import searched

        rates = [chart for chart in searched.over_each(record) if chart.title == "lr"]
        charts.png([searched.by_rung(record), *rates], root / folder.SEARCH_PLOT)
    elif record.steps:
        charts.png([loss(record)], root / folder.PLOT)


def html(records: list[Record]) -> str:
    """The page of one run, or of several."""
    values: dict[str, Any] = {**vars(charts), **globals(), "records": records}
    if any(record.board for record in records):
        from . import searched

        values |= vars(searched)
    values["style"] = Markup((HERE / "report.css").read_text("utf-8"))
    loader = FileSystemLoader(HERE)
    made = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return made.get_template("page.html.j2").render(values)


def differing(records: list[Record]) -> list[str]:
    """The options in which runs differ."""
    options = [flat(record.options) for record in records]
    names = dict.fromkeys(name for values in options for name in values if name != "res_path")
    return [name for name in names if len({values.get(name) for values in options}) > 1]


def overlaid(records: list[Record]) -> Chart:
    """The losses of several runs."""
    series: list[Series] = []
    for i, record in enumerate(records):
        points, few = _losses(record)
        line = means(points, few) if len(finite(points)) == len(points) else thinned(points)
        series.append(Series(name=record.name, points=line, color=str(i % 6 + 1)))
    return Chart(title="Loss", unit=f"{UNIT}, smoothed", series=series)


def loss(run: Record) -> Chart:
    """The loss by step, its mean, and the validation loss."""
    points, few = _losses(run)
    series = [Series(name="each step", points=thinned(points), look="faint")]
    if few > 1:
        series.append(Series(name=f"mean of {few} steps", points=means(points, few)))
    if held_out := list(run.validation.items()):
        series.append(Series(name="held-out", points=held_out, look="both", color="2"))
    best = run.best_step
    marks = [] if best is None else [(best, f"best: step {best:,}")]
    return Chart(title="Loss", unit=UNIT, marks=marks, series=series)


def _losses(run: Record) -> tuple[Points, int]:
    return [(s["step"], s["loss"]) for s in run.steps], max(1, len(run.steps) // 40)


def over_steps(run: Record, key: str, title: str) -> Chart:
    """A metric by step."""
    line = Series(name="", points=thinned([(s["step"], s[key]) for s in run.steps]))
    return Chart(title=title, log_y=False, series=[line])


def colour(value: float, most: float = MOST) -> Colour:
    """The colour of a change."""
    share = min(1.0, abs(value) / most) * STRONGEST if math.isfinite(value) else 0.0
    return "lose" if value < 0 else "gain", f"{share:.2f}"


def heat(updates: list[Row]) -> tuple[list[str], Cells]:
    """Each update's norm over its weight's, by layer and target."""
    shares = [u["update"] / u["weight"] if u["weight"] else math.nan for u in updates]
    most = max(filter(math.isfinite, shares), default=0) or 1.0
    cells: Cells = {}
    for row, share in zip(updates, shares, strict=True):
        at = re.fullmatch(r"(?:.*\.)?(\d+)\.(.+)", row["layer"])
        layer, target = at.groups() if at else (row["layer"], "update")
        text = f"{100 * share:.3g} %" if math.isfinite(share) else "not finite"
        title = f"‖s·BA‖ {row['update']:g}, ‖W‖ {row['weight']:g}"
        cells.setdefault(layer, {})[target] = (text, title, colour(share, most))
    return list(dict.fromkeys(target for row in cells.values() for target in row)), cells


def flat(values: Row, before: str = "", only: Collection[str] = ()) -> dict[str, str]:
    """Nested values by dotted names."""
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
