"""Charts of a search."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from .charts import UNIT, Chart, Series, text
from .read import Record, Row


def by_rung(record: Record) -> Chart:
    """Each trial's loss from rung to rung, until it retired."""
    last = max(row["rung"] for row in record.board)
    states = {"finalist": ("both", "4"), "winner": ("both", "accent")}
    series: list[Series] = []
    for state, (look, color) in {"others": ("both faint", "soft"), **states}.items():
        points: list[tuple[float, float]] = []
        for row in reversed(record.board):
            if state == (row["state"] if row["state"] in states else "others"):
                points += [(int(rung), _value(loss)) for rung, loss in row["losses"].items()]
                points.append((last, math.nan))
        series.append(Series(name=state, points=points, look=look, color=color))
    rungs = record.run.get("rungs", [])
    ticks = [(r["rung"], f"rung {r['rung']}\n{r['alive']} trials") for r in rungs[:last]]
    return Chart(title="Loss by rung", series=series, unit=UNIT, x_label="", x_ticks=ticks)


def over_each(record: Record) -> Iterator[Chart]:
    """The loss over each hyper-parameter; bars are finalists' seeds."""
    last, usual = max(row["rung"] for row in record.board), record.run["default"]
    bars = [(row, row["seeds"], "accent") for row in record.board if row.get("seeds")]
    bars.append(({**usual, "trial": 0}, usual["selection"]["seeds"], "2"))
    for name in record.board[0]["params"]:
        at, ticks, log = _axis(record, name)
        series: list[Series] = []
        for rung in range(1, last + 1):
            rows = [r for r in reversed(record.board) if r["losses"] and r["rung"] == rung]
            points = [(at(row), _value(row["losses"][str(rung)])) for row in rows]
            color = "accent" if rung == last else "mid" if rung > 1 else "soft"
            series.append(Series(name=f"rung {rung}", points=points, look="dots", color=color))
        for row, seeds, color in bars:
            losses = [loss for loss in seeds.values() if loss is not None]
            if losses and row["params"].get(name) is not None:  # steps or epochs
                points = [(at(row), f(losses)) for f in (min, max)]
                series.append(Series(name="", points=points, look="both", color=color))
        yield Chart(title=name, series=series, x_label="", x_ticks=ticks, log_x=log)


def _axis(record: Record, name: str) -> tuple[Callable[[Row], float], Any, bool]:
    """A trial's place on an axis, the ticks, and whether it is log."""
    params = [row["params"] for row in record.board] + [record.run["default"]["params"]]
    values = [v for row in params if (v := row.get(name)) is not None]
    are_numbers = all(isinstance(v, int | float) for v in values)
    kinds = {text(v): v for v in sorted(values, key=None if are_numbers else str)}
    if are_numbers and len(kinds) > 8:
        low, high = min(values), max(values)
        return (lambda row: row["params"][name]), None, low > 0 and high / low > 20
    columns = {kind: i for i, kind in enumerate(kinds)}

    def at(row: Row) -> float:
        beside = (int(row["trial"]) * 0.618034) % 1 - 0.5
        return columns[text(row["params"][name])] + 0.5 * beside

    return at, [(float(i), brief(value)) for i, value in enumerate(kinds.values())], False


def brief(value: Any) -> str:
    """A hyper-parameter's value, short."""
    many = isinstance(value, list) and len(value) > 1
    return f"{value[0]} + {len(value) - 1}" if many else text(value)


def _value(loss: float | None) -> float:
    return math.nan if loss is None else loss
