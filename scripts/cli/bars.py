"""How far a work is: a bar on a terminal, and lines of a training anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import gpt2

Advance = Callable[[int, float | None], None]


class Searched(Protocol):
    """What a search tells of itself: trials alive, rungs, finalists' runs, best loss, all steps."""

    alive: int
    rungs: list[list[int]]

    @property
    def again(self) -> Mapping[int | str, object]: ...

    @property
    def best(self) -> float: ...

    @property
    def total(self) -> int: ...


@contextmanager
def bar(
    console: Console, unit: str, total: float | None = None, completed: int = 0
) -> Iterator[Advance]:
    """A bar; gives a function of how much more is done, and of the share that it makes in all.

    Args:
        console: nothing is shown where it is no terminal.
        unit: what is counted.
        total: of them, where it is known.
        completed: what was done before.
    """
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as shown:
        task = shown.add_task("", total=total, completed=completed)

        def advance(done: int, share: float | None = None) -> None:
            shown.advance(task, done)
            if share:
                shown.update(task, total=round(shown.tasks[0].completed / share))

        yield advance


def follow(
    run: gpt2.Fit,
    steps: Iterable[gpt2.StepRecord],
    losses: list[float],
    console: Console,
    *,
    every: int,
) -> None:
    """Run the training and show how it goes.

    Args:
        run: the training.
        steps: what it yields.
        losses: gets the loss of each step.
        console: gets a line every few steps, and below them a progress bar if it is a terminal.
        every: steps a line; its loss is their mean.
    """
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    tokens, before, shown = 0, None if losses else 0.0, len(losses)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=run.total, completed=len(losses))
        for step in steps:
            if not losses and run.evaluated:
                console.print(f"step     0 · validation {run.evaluated[0]:.4f}")
            losses.append(step.loss)
            if before is None:  # what an earlier process took is no part of this one's speed
                before, tokens = step.seconds, -step.tokens
            tokens += step.tokens
            speed = f"{tokens / max(step.seconds - before, 1e-9):,.0f} tokens/s"
            found = "" if step.validation is None else f" · validation {step.validation:.4f}"
            progress.update(task, advance=1, description=f"loss {step.loss:.4f}{found} · {speed}")
            if len(losses) % every == 0 or len(losses) == run.total or found:
                recent = losses[shown:]
                shown, mean = len(losses), sum(recent) / len(recent)
                console.print(f"step {shown:>5} · loss {mean:.4f}{found} · {speed}")
    if len(losses) < run.total:
        console.print(f"Stopped after step {len(losses)}: the validation loss fell no more.")


@contextmanager
def searching(console: Console) -> Iterator[Callable[[Searched, int], None]]:
    """A bar of adapter-steps; gives a function of a search and of how many more are taken."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as shown:
        task, began = shown.add_task("adapter-steps"), perf_counter()
        taken, stage = 0, ""

        def advance(course: Searched, steps: int) -> None:
            nonlocal taken, stage
            taken += steps
            speed = f"{taken / max(perf_counter() - began, 1e-9):,.0f} adapter-steps/s"
            best = f" · best {course.best:.4f}" if math.isfinite(course.best) else ""  # none yet
            said = f"{course.alive} trials{best} · {speed}"
            shown.update(task, total=course.total, description=said)
            shown.advance(task, steps)
            begun = "finals" if course.again else f"rung {len(course.rungs)}"
            if begun != stage:
                stage = begun
                console.print(f"{stage} · {said}")

        yield advance
