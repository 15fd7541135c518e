"""The sections of a search's report: the result, each rung, each hyper-parameter, every trial."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from .charts import Chart, Series, short, thinned
from .read import Record, Row
from .sections import Section, number, table

OPEN = 32  # rows of the leaderboard that are not folded
CURVES = "The finalists and the default configuration, under the first of their seeds."
HYPER = (
    "Each dot is a trial, at the loss of the last rung that it reached: blue is the last of all. "
    "Early rungs have trained less, so compare dots of one colour. Bars span the seeds of the "
    "finalists, and of the default configuration (orange)."
)


def of_search(record: Record) -> Iterator[Section]:
    """All of them; none of a search that did not come to its end."""
    if not record.board or not record.run:
        return
    yield "Result", record.run["verdict"], [("table", _finalists(record))]
    rungs = record.run.get("rungs", [])
    shares = ", then ".join(f"{r['alive']:,} to {100 * r['share']:.3g} %" for r in rungs)
    note = f"Trials and how far they train, as a share of their schedules: {shares}; "
    note += f"{record.run['adapter_steps']:,} steps in all."
    yield "Successive halving", note, [("chart", by_rung(record))]
    yield "Each hyper-parameter", HYPER, [("charts", list(over_each(record)))]
    yield "Training", CURVES, [("chart", _training(record))]
    yield "Leaderboard", "", _leaderboard(record)


def _finalists(record: Record) -> dict[str, Any]:
    """The finalists and the default, over their seeds."""
    run = record.run
    configurations = [
        (str(row["trial"]), row["params"], row["seeds"]) for row in record.board if row.get("seeds")
    ]
    usual = run["default"]
    configurations.append(("default", usual["params"], usual["selection"]["seeds"]))
    tested = {str(run["winner"]["trial"]): run["winner"]["test"], "default": usual["test"]}
    rows: list[list[str]] = []
    for name, params, seeds in configurations:
        losses = [_value(loss) for loss in seeds.values()]
        spread = [number(v) for v in (sum(losses) / len(losses), min(losses), max(losses))]
        test = tested.get(name)
        what = " · ".join(f"{key} {_text(value)}" for key, value in params.items())
        rows.append([name, *spread, number(test["mean"]) if test else "", what])
    return table(["trial", "mean", "lowest", "highest", "test", "what it is"], rows, look="what")


def _leaderboard(record: Record) -> list[tuple[str, Any]]:
    """Every trial, the best first; of many the first are open."""
    rungs = [str(n) for n in range(1, max(row["rung"] for row in record.board) + 1)]
    heads = ["", "trial", "state", *(f"rung {n}" for n in rungs), *record.board[0]["params"]]
    rows = [
        [
            str(row["place"]),
            str(row["trial"]),
            row["state"] if not row["ended"] else f"ended: {row['ended']}",
            *(number(row["losses"][n]) if n in row["losses"] else "" for n in rungs),
            *map(_brief, row["params"].values()),
        ]
        for row in record.board
    ]
    parts: list[tuple[str, Any]] = [("table", table(heads, rows[:OPEN], best=True))]
    if more := rows[OPEN:]:
        parts.append(("details", (f"{len(more)} more", "table", table(heads, more))))
    return parts


def by_rung(record: Record) -> Chart:
    """Each trial's loss from rung to rung; a line ends where its trial retired."""
    last = max((row["rung"] for row in record.board), default=1)
    looks = {
        "others": ("both faint", "soft"),
        "finalist": ("both", "4"),
        "winner": ("both", "accent"),
    }
    series: list[Series] = []
    for kind, (look, color) in looks.items():
        points, names = [], []
        for row in reversed(record.board):
            if kind == (row["state"] if row["state"] in looks else "others"):
                losses = [(int(rung), _value(loss)) for rung, loss in row["losses"].items()]
                points += [*losses, (last, math.nan)]
                names += [f"trial {row['trial']}"] * (len(losses) + 1)
        series.append(Series(name=kind, points=points, names=names, look=look, color=color))
    alive = {r["rung"]: r["alive"] for r in record.run.get("rungs", [])}
    ticks = [(n, f"rung {n}\n{alive.get(n, '?')} trials") for n in range(1, last + 1)]
    how = {"unit": "nats a token", "x_label": "", "x_ticks": ticks, "near": True}
    return Chart(name="halving", title="Loss by rung", series=series, **how)


def over_each(record: Record) -> Iterator[Chart]:
    """The loss over each hyper-parameter: rungs in colours, bars for the seeds of finalists."""
    last = max(row["rung"] for row in record.board)
    usual = record.run["default"]
    for name in record.board[0]["params"]:
        at, ticks, log = _axis(record, name)
        series: list[Series] = []
        for rung in range(1, last + 1):
            rows = [r for r in reversed(record.board) if r["losses"] and r["rung"] == rung]
            points = [(at(row), _value(row["losses"][str(rung)])) for row in rows]
            names = [f"trial {row['trial']}, {_text(row['params'][name])}" for row in rows]
            color = "accent" if rung == last else "mid" if rung > 1 else "soft"
            how = {"names": names, "look": "dots", "color": color}
            series.append(Series(name=f"rung {rung}", points=points, **how))
        bars = [(row, row["seeds"], "accent") for row in record.board if row.get("seeds")]
        if usual["params"].get(name) is not None:  # of steps and epochs it has one
            bars.append(({**usual, "trial": 0}, usual["selection"]["seeds"], "2"))
        for row, seeds, color in bars:
            losses = [loss for loss in seeds.values() if loss is not None]
            points = [(at(row), f(losses)) for f in (min, max)] if losses else []
            series.append(Series(name="", points=points, look="both", color=color))
        how = {"x_label": "", "x_ticks": ticks, "log_x": log, "near": True}
        yield Chart(name=f"over {name}", title=name, series=series, **how)


def _axis(
    record: Record, name: str
) -> tuple[Callable[[Row], float], list[tuple[float, str]] | None, bool]:
    """Where a trial stands on a hyper-parameter's axis; the axis' ticks, and whether it is log.

    A choice has a column a value, in which trials stand beside one another.
    """
    params = [row["params"] for row in record.board] + [record.run["default"]["params"]]
    values = [v for row in params if (v := row.get(name)) is not None]
    kinds = {_text(v): v for v in sorted(values, key=_order)}
    if len(kinds) > 8 and all(isinstance(v, int | float) for v in values):
        low, high = min(values), max(values)
        return (lambda row: row["params"][name]), None, low > 0 and high / low > 20
    columns = {text: i for i, text in enumerate(kinds)}

    def at(row: Row) -> float:
        beside = (int(row["trial"]) * 0.618034) % 1 - 0.5
        return columns[_text(row["params"][name])] + 0.5 * beside

    return at, [(float(i), _brief(value)) for i, value in enumerate(kinds.values())], False


def _order(value: Any) -> tuple[int, Any]:
    return (0, value) if isinstance(value, int | float) else (1, str(value))


def _training(record: Record) -> Chart:
    """The training loss of the finalists and of the default."""
    states = {row["trial"]: row["state"] for row in record.board if row.get("seeds")}
    looks = {"winner": ("line", "accent"), "finalist": ("faint", "4"), "default": ("line", "2")}
    series: list[Series] = []
    for row in record.curves:
        kind = "default" if row["trial"] == "default" else states.get(row["trial"])
        if kind:
            name = kind if kind == "default" else f"{row['trial']} ({kind})"
            points = thinned([(i, _value(loss)) for i, loss in enumerate(row["training"], 1)])
            look, color = looks[kind]
            series.append(Series(name=name, points=points, look=look, color=color))
    return Chart(name="training", title="Training loss", unit="nats a token", series=series)


def _brief(value: Any) -> str:
    """A hyper-parameter's value in a word or two."""
    if isinstance(value, list) and len(value) > 1:
        return f"{value[0]} + {len(value) - 1}"
    return _text(value)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(value)
    return short(value) if isinstance(value, int | float) else str(value)


def _value(loss: float | None) -> float:
    return math.nan if loss is None else loss
