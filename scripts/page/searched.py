"""The sections of a search's report: what came out, and every trial."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..tuner import noise
from . import search_charts
from .markup import Markup, joined, table, tag
from .record import Record
from .search_charts import Row, brief, value_of
from .sections import Section, number

FIRST = 32  # rows of the leaderboard that are open
CURVES = "The finalists and the default configuration, under the first of their seeds."
HYPER = (
    "Each dot is a trial, at the loss of the last rung that it reached: blue is the last of all. "
    "Early rungs have trained less, so compare dots of one colour. Bars span the seeds of the "
    "finalists, and of the default configuration (orange)."
)


def sections_of(record: Record) -> Iterator[Section]:
    """All of them."""
    if not record.board or not record.run:  # the record comes last, and says what came out
        return
    yield "Result", verdict(record), [finalists(record)]
    yield "Successive halving", halving_note(record), [search_charts.tree(record)]
    yield "Each hyper-parameter", HYPER, [list(search_charts.over_each(record))]
    yield "Training", CURVES, [search_charts.training(record)]
    yield "Leaderboard", "", [leaderboard(record)]


def verdict(record: Record) -> str:
    """What may be said of the winner, and what may not."""
    run = record.run
    winner, alike = run["winner"], run["not_told_apart"]
    n = sum("seeds" in row for row in record.board)
    seeds, on_test = len(winner["selection"]["seeds"]), run["winner_on_test"]
    return noise.said(winner["trial"], alike, n, seeds, on_test, run["told_apart_by"])


def finalists(record: Record) -> Markup:
    """The finalists and the default, over their seeds."""
    run = record.run
    rows = [r for r in record.board if r.get("seeds")]
    found = [(str(r["trial"]), r["params"], list(r["seeds"].values())) for r in rows]
    tested = {str(run["winner"]["trial"]): run["winner"]["test"], "default": run["default"]["test"]}
    usual = run["default"]
    found.append(("default", usual["params"], list(usual["selection"]["seeds"].values())))
    made = [
        [name, *spread(seeds), mean_of(tested.get(name)), tag("span", told(params), class_="what")]
        for name, params, seeds in found
    ]
    heads = ["trial", "mean", "lowest", "highest", "test", "what it is"]
    return table(heads, made)


def mean_of(tested: Row | None) -> str:
    """The mean loss on the test data, where there is one."""
    return number(tested["mean"]) if tested else ""


def spread(losses: list[float | None]) -> list[str]:
    """Mean, lowest and highest."""
    known = [math.nan if loss is None else loss for loss in losses]
    return [number(v) for v in (sum(known) / len(known), min(known), max(known))]


def told(params: Row) -> str:
    """A configuration in a line."""
    return " · ".join(f"{name} {value_of(value)}" for name, value in params.items())


def halving_note(record: Record) -> str:
    """How many were trained how far."""
    rungs = record.run.get("rungs", [])
    parts = [f"{r['alive']:,} to {100 * r['share']:.3g} %" for r in rungs]
    steps = record.run.get("adapter_steps")
    told = f"Trials and how far they train, as a share of their schedules: {', then '.join(parts)}"
    return f"{told}; {steps:,} steps in all." if parts and steps else ""


def leaderboard(record: Record) -> Markup:
    """Every trial, the best first; of many the first are open."""
    last = max(row["rung"] for row in record.board)
    rungs = [str(n) for n in range(1, last + 1)]
    names = record.board[0]["params"]
    heads = ["", "trial", "state", *(f"rung {n}" for n in rungs), *names]
    rows = [
        [
            str(row["place"]),
            str(row["trial"]),
            row["state"] if not row["ended"] else f"ended: {row['ended']}",
            *(number(row["losses"][n]) if n in row["losses"] else "" for n in rungs),
            *map(brief, row["params"].values()),
        ]
        for row in record.board
    ]
    parts = [table(heads, rows[:FIRST], best=0)]
    if len(rows) > FIRST:
        rest = table(heads, rows[FIRST:])
        parts.append(tag("details", tag("summary", f"{len(rows) - FIRST} more"), rest))
    return joined(*parts)
