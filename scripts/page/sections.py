"""What a run's report shows, as plain values: figures, charts, answers, colours, tables."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .charts import Chart, Points, Series, finite, means, short, thinned
from .read import Record, Row

MOST, STRONGEST = 4.0, 0.45  # nats that get the full colour, and its opacity: text still reads
Colour = tuple[str, str]  # its name, its opacity


def compared(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """The losses of several runs, and the options in which they differ."""
    options = [flat(record.options) for record in records]
    names = [n for n in dict.fromkeys(n for o in options for n in o) if n != "res_path"]
    differ = [n for n in names if len({o.get(n) for o in options}) > 1]
    rows: list[list[str]] = []
    for record, own in zip(records, options, strict=True):
        last = number(record.steps[-1]["loss"]) if record.steps else ""
        best = number(record.best_loss) if record.validation else ""
        rows.append(
            [record.name, str(len(record.steps)), last, best, *(own.get(n, "") for n in differ)]
        )
    return ["run", "steps", "last loss", "held-out loss", *differ], rows


def overlaid(records: Sequence[Record]) -> Chart:
    """The loss of each of several runs."""
    series: list[Series] = []
    for i, record in enumerate(records):
        points, few = _losses(record)
        line = means(points, few) if len(finite(points)) == len(points) else thinned(points)
        series.append(Series(name=record.name, points=line, color=str(i % 6 + 1)))
    return Chart(name="compared", title="Loss", unit="nats a token, smoothed", series=series)


def loss(run: Record) -> Chart:
    """The loss of each step, its mean, and that on validation data."""
    points, few = _losses(run)
    series = [Series(name="each step", points=thinned(points), look="faint")]
    if few > 1:
        series.append(Series(name=f"mean of {few} steps", points=means(points, few)))
    marks: list[tuple[float, str]] = []
    if held_out := list(run.validation.items()):
        series.append(Series(name="held-out", points=held_out, look="both", color="2"))
        if run.best_step is not None:
            marks.append((run.best_step, f"best: step {run.best_step:,}"))
    how: dict[str, Any] = {"title": "Loss", "unit": "nats a token", "marks": marks}
    return Chart(name=f"loss {run.name}", series=series, **how)


def _losses(run: Record) -> tuple[Points, int]:
    """The loss of each step, and of how many steps a mean is."""
    return [(s["step"], s["loss"]) for s in run.steps], max(1, len(run.steps) // 40)


def rates(run: Record) -> list[Chart]:
    """Learning rate and gradient norm."""
    titles = {"lr": ("Learning rate", ""), "grad_norm": ("Gradient norm", "before clipping")}
    charts: list[Chart] = []
    for key, (title, unit) in titles.items():
        line = Series(name="", points=thinned([(s["step"], s[key]) for s in run.steps if key in s]))
        how = {"title": title, "unit": unit, "series": [line]}
        charts.append(Chart(name=f"{key} {run.name}", log_y=False, **how))
    return charts


def change(passage: Row) -> str:
    """What the passage is, and how much likelier the adapter makes it."""
    changes = [after - b for b, after in zip(passage["base"], passage["adapter"], strict=True)]
    known = [change for change in changes if math.isfinite(change)]
    mean = f"{sum(known) / len(known) if known else math.nan:+.3f}".replace("-", "−")
    return (
        f"A {'held-out' if passage['held_out'] else 'learnt'} passage: blue where the adapter "
        "makes the token likelier than the base does, orange where less likely; full colour at "
        f"{MOST:g} nats. {mean} nats a token."
    )


def tokens(passage: Row) -> list[tuple[str, str, Colour]]:
    """Each token's text, its numbers, its colour."""
    rows = [(passage["tokens"][0], "", colour(0))]
    for piece, *both in zip(
        passage["tokens"][1:], passage["base"], passage["adapter"], strict=True
    ):
        more = both[1] - both[0]
        told = f"base {both[0]:.2f}, adapter {both[1]:.2f}: {more:+.2f} nats".replace("-", "−")
        rows.append((piece, f"{piece.strip() or 'space'} · {told}", colour(more)))
    return [row for row in rows if row[0]]


def colour(value: float, most: float = MOST) -> Colour:
    """The colour of a change, or of a share."""
    share = min(1.0, abs(value) / most) * STRONGEST if math.isfinite(value) else 0.0
    return "lose" if value < 0 else "gain", f"{share:.2f}"


def heat(updates: Sequence[Row]) -> tuple[list[str], list[tuple[str, list[Any]]]]:
    """The size of each update as a share of its weight's, a row a layer and a column a target."""
    cells: dict[str, dict[str, Row]] = {}
    for row in updates:  # a path without a number is a row of its own
        at = re.fullmatch(r"(?:.*\.)?(\d+)\.(.+)", row["layer"])
        layer, target = at.groups() if at else (row["layer"], "update")
        cells.setdefault(layer, {})[target] = row

    def share(row: Row) -> float:
        return row["update"] / row["weight"] if row["weight"] else math.nan

    most = max([s for row in updates if math.isfinite(s := share(row))], default=1.0) or 1.0

    def cell(row: Row | None) -> tuple[str, str, Colour]:
        if row is None:
            return "", "", colour(0)
        text = f"{100 * share(row):.3g} %" if math.isfinite(share(row)) else "not finite"
        return text, f"‖s·BA‖ {row['update']:g}, ‖W‖ {row['weight']:g}", colour(share(row), most)

    targets = list(dict.fromkeys(target for row in cells.values() for target in row))
    return targets, [(layer, [cell(row.get(t)) for t in targets]) for layer, row in cells.items()]


def facts(run: Row) -> Row:
    """What a run had to do with, beside its options."""
    names = ("parameters", "device", "machine", "data", "seconds", "versions")
    return {name: run[name] for name in names if name in run}


def numeric(rows: Sequence[Sequence[str]]) -> list[bool]:
    """Which columns of a table are numbers."""

    def is_number(cell: str) -> bool:
        return not cell or cell == "not finite" or cell.lstrip("+−-")[:1].isdigit()

    return [all(map(is_number, column)) for column in zip(*rows, strict=True)]


def flat(values: Row, before: str = "") -> dict[str, str]:
    """Nested values by dotted names."""
    names: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            names |= flat(value, f"{before}{key}.")
        else:
            names[f"{before}{key}"] = shown(value)
    return names


def shown(value: Any) -> str:
    """A value of an option."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(f"[{shown(v)}]" if isinstance(v, list) else shown(v) for v in value) or "–"
    return f"{value:,}" if isinstance(value, int) else str(value)


def number(value: float | None) -> str:
    """A loss."""
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4f}"


def text(value: Any) -> str:
    """A hyper-parameter's value."""
    if isinstance(value, list):
        return " ".join(value)
    return short(value) if isinstance(value, int | float) else str(value)
