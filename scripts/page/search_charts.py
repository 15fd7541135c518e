"""The charts of a search: loss from rung to rung, over each hyper-parameter, and by step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from .charts import Chart, Series, short, thinned
from .record import Record

Row = Mapping[str, Any]


def tree(record: Record) -> Chart:
    """Each trial's loss from rung to rung; a line ends where its trial retired."""
    last = max((row["rung"] for row in record.board), default=1)
    kinds: dict[str, list[Row]] = {"others": [], "finalist": [], "winner": []}
    for row in reversed(record.board):
        kinds[row["state"] if row["state"] in kinds else "others"].append(row)
    looks = {"others": "soft", "finalist": "4", "winner": "accent"}
    shown: list[Series] = []
    for kind, rows in kinds.items():
        points, names = [], []
        for row in rows:
            found = [(int(rung), _value(loss)) for rung, loss in row["losses"].items()]
            points += [*found, (last, math.nan)]
            names += [f"trial {row['trial']}"] * (len(found) + 1)
        look = "both" if kind != "others" else "both faint"
        shown.append(Series(name=kind, points=points, names=names, look=look, color=looks[kind]))
    alive = {r["rung"]: r["alive"] for r in record.run.get("rungs", [])}
    ticks = [(n, f"rung {n}\n{alive.get(n, '?')} trials") for n in range(1, last + 1)]
    return Chart(name="halving", title="Loss by rung", unit="nats a token", series=shown,
                 x_ticks=ticks, x_label="", near=True)  # fmt: skip


def over_each(record: Record) -> Iterator[Chart]:
    """The loss over each hyper-parameter."""
    names = list(record.board[0]["params"])
    last = max(row["rung"] for row in record.board)
    for name in names:
        at, ticks, log = places(record, name)
        groups: dict[int, list[Row]] = {rung: [] for rung in range(1, last + 1)}
        for row in reversed(record.board):
            if row["losses"]:
                groups[row["rung"]].append(row)
        shown = [
            Series(
                name=f"rung {rung}",
                points=[(at(row), _value(row["losses"][str(rung)])) for row in rows],
                names=[f"trial {row['trial']}, {value_of(row['params'][name])}" for row in rows],
                look="dots",
                color="accent" if rung == last else "mid" if rung > 1 else "soft",
            )
            for rung, rows in groups.items()
        ]
        for row in record.board:
            if row.get("seeds"):
                shown.append(bar(at(row), row["seeds"], "accent"))
        usual = record.run.get("default")
        if usual and usual["params"].get(name) is not None:  # of steps and epochs it has one
            shown.append(bar(at({**usual, "trial": 0}), usual["selection"]["seeds"], "2"))
        yield Chart(name=f"over {name}", title=name, series=shown, x_label="", near=True,
                    x_ticks=ticks, log_x=log)  # fmt: skip


def bar(at: float, seeds: Mapping[str, float | None], color: str) -> Series:
    """The span of a configuration's seeds."""
    known = [loss for loss in seeds.values() if loss is not None]
    points = [(at, min(known)), (at, max(known))] if known else []
    return Series(name="", points=points, look="both", color=color)


def places(record: Record, name: str) -> tuple[Any, list[tuple[float, str]] | None, bool]:
    """Where a trial stands on a hyper-parameter's axis; the axis' ticks, and whether it is log.

    A choice has a column a value, in which trials stand beside one another.
    """
    values = [row["params"][name] for row in record.board]
    if usual := record.run.get("default"):
        values.append(usual["params"].get(name))
    values = [v for v in values if v is not None]
    kinds = sorted({value_of(v): v for v in values}.items(), key=lambda p: _order(p[1]))
    if len(kinds) > 8 and all(isinstance(v, int | float) for v in values):
        low, high = min(values), max(values)
        return (lambda row: row["params"][name]), None, low > 0 and high / low > 20
    order = {said: i for i, (said, _) in enumerate(kinds)}
    ticks = [(float(order[said]), brief(kind)) for said, kind in kinds]

    def at(row: Row) -> float:
        beside = (int(row["trial"]) * 0.618034) % 1 - 0.5
        return order[value_of(row["params"][name])] + 0.5 * beside

    return at, ticks, False


def _order(value: Any) -> tuple[int, Any]:
    return (0, value) if isinstance(value, int | float) else (1, str(value))


def brief(value: Any) -> str:
    """A hyper-parameter's value in a word or two."""
    if isinstance(value, list) and len(value) > 1:
        return f"{value[0]} + {len(value) - 1}"
    return value_of(value)


def training(record: Record) -> Chart:
    """The training loss of the finalists and of the default."""
    wanted = {row["trial"]: row["state"] for row in record.board if row.get("seeds")}
    looks = {"winner": ("line", "accent"), "finalist": ("faint", "4"), "default": ("line", "2")}
    shown: list[Series] = []
    for row in record.curves:
        kind = "default" if row["trial"] == "default" else wanted.get(row["trial"])
        if kind is None:
            continue
        look, color = looks[kind]
        name = "default" if kind == "default" else f"{row['trial']} ({kind})"
        points = [(i, _value(loss)) for i, loss in enumerate(row["training"], 1)]
        shown.append(Series(name=name, points=thinned(points), look=look, color=color))
    return Chart(name="training", title="Training loss", unit="nats a token", series=shown)


def value_of(value: Any) -> str:
    """A hyper-parameter's value."""
    if isinstance(value, list):
        return " ".join(value)
    return short(value) if isinstance(value, int | float) else str(value)


def _value(loss: float | None) -> float:
    return math.nan if loss is None else loss
