"""What a search leaves behind: its winner, every trial, every curve, and what was told apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

import gpt2
import lora
from lora.config import as_names

from ..page import page
from ..runs import results
from ..runs.folder import CURVES, LEADERBOARD, SEARCH_PLOT, STUDY, TRAINED_BY, WINNER
from . import noise, proposals, verdict
from .course import Course
from .runs import DEFAULT, Run

Look = Callable[[gpt2.GPT2], dict[str, Any]]


def write(
    course: Course, options: Namespace, place: Path, about: Mapping[str, Any], look: Look
) -> None:
    """Write all of it; the record of the run last, since it says that the search has ended.

    Args:
        course: what was searched.
        options: of the search.
        place: its folder.
        about: what is known of it but for what came out.
        look: tells what the winner's adapter does to the model that carries it.
    """
    best, changed = place / WINNER, dict[str, Any]()

    def keep(model: gpt2.GPT2) -> None:
        lora.save(model, best)
        changed.update(look(model))

    course.waves.saved(course.runs[course.winner], keep)
    text = yaml.safe_dump(train_options(course, options), sort_keys=False)
    (best / TRAINED_BY).write_text(text, encoding="utf-8")
    results.write_lines(place / LEADERBOARD, lines(course))
    results.write_lines(place / CURVES, curves(course))
    proposals.write_study(place / STUDY, course.plan.space, course.known())
    plot(course, place / SEARCH_PLOT)
    told = {**about, **outcome(course), **changed, "versions": results.versions()}
    results.write_record(place, told)
    page.write(place)


def train_options(course: Course, options: Namespace) -> dict[str, Any]:
    """The options with which `train_qa.py` trains the winner again."""
    run = course.runs[course.winner]
    recipe, given = run.recipe, {k: v for k, v in options.as_dict().items() if k not in NOT_OF_ONE}
    adapter, training = recipe.adapter, recipe.training
    own = {name: getattr(training, name) for name in ("lr", "steps", "epochs", "weight_decay")}
    own |= {"b_ratio": recipe.b_ratio, "eval_every": run.total}
    named = {"r": adapter.r, "alpha": adapter.alpha, "dropout": adapter.dropout}
    named["targets"] = list(as_names(adapter.targets))
    return {**given, **own, "lora": {**given["lora"], **named}}


NOT_OF_ONE = (
    "config resume overwrite res_path space trials slots rungs keep sampler finalists seeds device"
).split()


def ranked(course: Course) -> list[int]:
    """All trials, the winner first; then the finalists by their mean, the others as far as they
    came, by their loss there."""
    finalists = course.finalists

    def place(trial: int) -> tuple[Any, ...]:
        found = course.by_rung(trial)
        if trial in finalists:
            mean = sum(course.losses_of(trial))
            return (trial != course.winner, 0, mean if math.isfinite(mean) else math.inf)
        return (True, 1, -max(found, default=0), found[max(found)] if found else math.inf, trial)

    return sorted(range(len(course.runs)), key=place)


def state(course: Course, trial: int) -> str:
    """What became of a trial, in a word."""
    if trial == course.winner:
        return "winner"
    if trial in course.finalists:
        return "finalist"
    if course.runs[trial].ended:
        return "ended"
    return "complete" if course.plan.halving.rungs in course.by_rung(trial) else "retired"


def lines(course: Course) -> Iterator[dict[str, Any]]:
    """A row a trial, the best first."""
    names = tuple(course.plan.space.axes)
    for number, trial in enumerate(ranked(course), 1):
        run, found = course.runs[trial], course.by_rung(trial)
        row = {
            "place": number,
            "trial": trial,
            "state": state(course, trial),
            "params": run.recipe.values(names),
            "rung": max(found, default=0),
            "steps": run.taken,
            "total": run.total,
            "losses": found,
            "ended": run.ended,
        }
        if trial in course.finalists:
            row["seeds"] = by_seed(course.seeds_of(trial))
        yield row


def by_seed(runs: list[Run]) -> dict[int, float | None]:
    """The loss of each seed; None of one that ended."""
    return {run.seed: finite(run.loss) for run in runs}


def finite(value: float) -> float | None:
    """A number as JSON has it, which knows no NaN."""
    return value if math.isfinite(value) else None


def curves(course: Course) -> Iterator[dict[str, Any]]:
    """A row a trial, with its curves; the usual configuration's is the last."""
    trials: list[int | str] = [*range(len(course.runs)), DEFAULT]
    for trial in trials:
        first, *others = course.seeds_of(trial)
        row = {"trial": trial, "seed": first.seed, **_curve(first)}
        yield row | ({"seeds": {run.seed: _curve(run) for run in others}} if others else {})


def outcome(course: Course) -> dict[str, Any]:
    """What came out, for the record of the run."""
    halving, names = course.plan.halving, tuple(course.plan.space.axes)
    rungs = [
        {
            "rung": rung + 1,
            "share": 1 / halving.keep ** (halving.rungs - 1 - rung),
            "alive": len(trials),
            "trials": trials,
            "ended": [n for n in trials if course.runs[n].ended and rung + 1 not in
                      course.by_rung(n) and rung in (0, *course.by_rung(n))],
            "steps": sum(halving.steps(rung, course.runs[n].total) for n in trials),
        }
        for rung, trials in enumerate(course.rungs)
    ]  # fmt: skip
    return {
        "rungs": rungs,
        "adapter_steps": course.done,
        "winner": {"trial": course.winner, **_told(course, course.winner, names)},
        "default": _told(course, DEFAULT, names),
        "finalists": course.finalists,
        "told_apart_by": noise.TEST,
        "not_told_apart": course.alike,
        "winner_on_test": verdict.against_default(course),
    }


def plot(course: Course, file: Path) -> None:
    """Draw each trial's loss by its step, and the loss of all by their learning rate."""
    from matplotlib.figure import Figure  # slow to import; drawn this way it needs no display
    from matplotlib.ticker import LogFormatter, ScalarFormatter

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    finalists = course.finalists
    for trial, run in enumerate(course.runs):
        line = sorted(run.losses.items())
        if not line:
            continue
        color = "tab:orange" if trial == course.winner else "tab:blue"
        style = {"color": color if trial in finalists else "0.75", "linewidth": 1}
        left.plot(*zip(*line, strict=True), marker=".", **style)
        if state(course, trial) in ("retired", "ended"):
            left.plot(*line[-1], marker="x" if run.ended else "|", color="0.4")
    left.set(xlabel="step", ylabel="selection loss (nats a token)", xscale="log")
    left.set_title("Trials; | retired, x ended, blue finalists, orange the winner")
    alive = [n for n, run in enumerate(course.runs) if run.losses]
    last = [course.runs[n].losses[max(course.runs[n].losses)] for n in alive]
    rates = [course.runs[n].recipe.training.lr for n in alive]
    ranks = [course.runs[n].recipe.adapter.r for n in alive]
    drawn = right.scatter(rates, last, c=[math.log2(r) for r in ranks], cmap="viridis", s=18)
    bar = figure.colorbar(drawn, ax=right)
    bar.set_ticks([math.log2(r) for r in sorted({*ranks})][:12])
    bar.set_ticklabels([str(r) for r in sorted({*ranks})][:12])
    bar.set_label("r")
    right.set(xlabel="lr", ylabel="last selection loss", xscale="log", yscale="log")
    left.set_yscale("log")
    for axis in (left.xaxis, left.yaxis, right.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    figure.savefig(file, dpi=130, metadata={"Software": None})


def _told(course: Course, trial: int | str, names: tuple[str, ...]) -> dict[str, Any]:
    """A configuration and its losses over the seeds, on both data."""
    runs = course.seeds_of(trial)
    losses, tested = course.losses_of(trial), course.tested.get(trial)
    return {
        "params": runs[0].recipe.values(names),
        "selection": {"seeds": by_seed(runs), **_spread(losses)},
        "test": tested and {
            "seeds": dict(zip([run.seed for run in runs], tested, strict=True)),
            **_spread(tested),
        },
        "ended": next((run.ended for run in runs if run.ended), None),
    }  # fmt: skip


def _spread(losses: list[float]) -> dict[str, float | None]:
    return {name: finite(value) for name, value in noise.spread(losses).items()}


def _curve(run: Run) -> dict[str, Any]:
    return {"training": [finite(loss) for loss in run.curve], "selection": run.losses}
