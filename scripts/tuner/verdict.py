"""What may be said of a search's winner, and what may not; shown and recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from . import noise
from .course import Course
from .runs import DEFAULT


def against_default(course: Course) -> str | None:
    """Whether the winner is better than the usual configuration on the last data, or worse, or
    alike; None without such data."""
    won, usual = (course.tested.get(trial) for trial in (course.winner, DEFAULT))
    if won is None or usual is None:
        return None
    if not noise.told_apart(won, usual):
        return "alike"
    return "better" if sum(won) < sum(usual) else "worse"


def finalist_table(course: Course, ordered: Sequence[int]) -> Table:
    """The finalists and the usual configuration: what they are, and their losses over the seeds."""
    names = tuple(course.plan.space.axes)
    table = Table("trial", "what it is", title="Finalists")
    for heading in ("mean", "min", "max", "sd", "test"):
        table.add_column(heading, justify="right", no_wrap=True)
    for trial in (*ordered[: len(course.finalists)], DEFAULT):
        run, spread = course.seeds_of(trial)[0], noise.spread(course.losses_of(trial))
        values = run.recipe.values(names).items()
        said = " · ".join(f"{name} {_short(value)}" for name, value in values)
        tested = course.tested.get(trial)
        shown = f"{sum(tested) / len(tested):.4f}" if tested else ""
        table.add_row(str(trial), said, *(f"{v:.4f}" for v in spread.values()), shown)
    return table


def said(course: Course) -> str:
    """What may be said of the winner, and what may not."""
    n, on_test = len(course.finalists), against_default(course)
    return noise.said(course.winner, course.alike, n, course.plan.seeds, on_test, noise.TEST)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)
