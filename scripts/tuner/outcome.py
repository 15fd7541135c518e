"""What came out of a search: who won, what can be told apart, and the files that stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml
from rich.table import Table

import gpt2
import lora

from ..cli.console import table
from ..runs import folder, record
from . import sampler
from .search import Search
from .trials import DEFAULT, Run

# Student's t, 97.5 %, for 1, 2, … degrees of freedom.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
TEST = "Configurations are told apart by Student's paired t-test over the seeds (two-sided, 95 %)."
ON_TEST = {
    "better": "On the test data it is better than the default configuration.",
    "worse": "On the test data it is WORSE than the default configuration.",
    "alike": "On the test data it cannot be told apart from the default configuration.",
    None: "There is no test data, or the default configuration ended: they are not compared.",
}
NOT_OF_ONE = "space trials slots rungs keep sampler finalists seeds device".split()


def write(
    search: Search,
    options: Mapping[str, Any],
    place: Path,
    facts: Mapping[str, Any],
    measure: Callable[[gpt2.GPT2], dict[str, Any]],
) -> str:
    """Write all that stays, the record last, since it means that the search has ended.

    `facts` go into the record, as what `measure` finds in the model that carries the winner.
    Gives what may be claimed of the winner.
    """
    best, stats = place / folder.WINNER, dict[str, Any]()

    def keep(model: gpt2.GPT2) -> None:
        lora.save(model, best, notes={"command": f"train_qa.py --config {folder.TRAINED_BY}"})
        stats.update(measure(model))

    search.waves.saved(search.runs[search.winner], keep)
    text = yaml.safe_dump(train_options(search, options), sort_keys=False)
    (best / folder.TRAINED_BY).write_text(text, encoding="utf-8")
    record.write_lines(place / folder.LEADERBOARD, leaderboard(search))
    record.write_lines(place / folder.CURVES, curves(search))
    sampler.write_study(place / folder.STUDY, search.plan.space, search.known())
    outcome = results(search)
    record.write(place, {"kind": "search", **facts, **outcome, **stats})
    return outcome["verdict"]


def differ(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether losses of the same seeds, in the same order, differ by more than the seeds' noise."""
    ended = [not all(map(math.isfinite, losses)) for losses in (one, other)]
    if any(ended):
        return not all(ended)
    differences = [a - b for a, b in zip(one, other, strict=True)]
    if len(differences) < 2:
        return False
    error = stdev(differences) / math.sqrt(len(differences))
    return abs(fmean(differences)) > T[min(len(differences) - 1, len(T)) - 1] * error


def alike(best: int, losses: Mapping[int, Sequence[float]]) -> list[int]:
    """The others whose losses cannot be told apart from the best one's."""
    return [n for n, own in losses.items() if n != best and not differ(own, losses[best])]


def spread(losses: Sequence[float]) -> dict[str, float]:
    """Mean, lowest, highest, standard deviation over seeds; NaN where a training ended early."""
    if not all(map(math.isfinite, losses)):
        return dict.fromkeys(("mean", "min", "max", "sd"), math.nan)
    sd = stdev(losses) if len(losses) > 1 else math.nan
    return {"mean": fmean(losses), "min": min(losses), "max": max(losses), "sd": sd}


def verdict(
    winner: int, others: Sequence[int], finalists: int, seeds: int, test: str | None
) -> str:
    """What may be claimed of the finalist with the lowest mean loss, and what may not.

    The others cannot be told apart from it; `test`, a key of `ON_TEST`, is how it is on test data.
    """
    claim = f"Trial {winner} is the only finalist."
    if others:
        claim = (
            f"Of the finalists trial {winner} has the lowest mean loss; it cannot be told apart "
        )
        claim += f"from {', '.join(map(str, others))} over {seeds} seeds."
    elif finalists > 1:
        claim = f"Trial {winner} is the best of the finalists over {seeds} seeds."
    return f"{claim} {ON_TEST[test]} {TEST}"


def results(search: Search) -> dict[str, Any]:
    """What came out, for the record."""
    halving, winner, finalists = search.plan.halving, search.winner, search.finalists
    others = alike(winner, {n: search.losses_of(n) for n in finalists})
    shares = [1 / halving.keep**n for n in reversed(range(halving.rungs))]
    rungs = [
        {"rung": number, "share": share, "alive": len(trials), "trials": trials}
        for number, (share, trials) in enumerate(zip(shares, search.rungs, strict=True), 1)
    ]
    won, usual = (search.tested.get(trial) for trial in (winner, DEFAULT))
    test = None
    if won and usual:
        lower = "better" if sum(won) < sum(usual) else "worse"
        test = lower if differ(won, usual) else "alike"
    return {
        "rungs": rungs,
        "adapter_steps": search.done,
        "winner": {"trial": winner, **_configuration(search, winner)},
        "default": _configuration(search, DEFAULT),
        "finalists": finalists,
        "not_told_apart": others,
        "winner_on_test": test,
        "verdict": verdict(winner, others, len(finalists), search.plan.seeds, test),
    }


def _configuration(search: Search, trial: int | str) -> dict[str, Any]:
    """A configuration and its losses over the seeds, on both splits."""
    runs, tested = search.seeds_of(trial), search.tested.get(trial)

    def over_seeds(losses: Sequence[float]) -> dict[str, Any]:
        seeds = {run.seed: _finite(loss) for run, loss in zip(runs, losses, strict=True)}
        return {"seeds": seeds} | {name: _finite(v) for name, v in spread(losses).items()}

    return {
        "params": runs[0].recipe.values([*search.plan.space.axes]),
        "selection": over_seeds(search.losses_of(trial)),
        "test": tested and over_seeds(tested),
        "ended": next((run.ended for run in runs if run.ended), None),
    }


def train_options(search: Search, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with which `train_qa.py` trains the winner again."""
    run = search.runs[search.winner]
    given = {name: value for name, value in options.items() if name not in NOT_OF_ONE}
    given |= run.recipe.values(["lr", "steps", "epochs", "weight_decay", "b_ratio"])
    own = run.recipe.values(["r", "alpha", "dropout", "targets"])
    return {**given, "eval_every": run.total, "lora": {**given["lora"], **own}}


def ranked(search: Search) -> list[int]:
    """All trials, the winner first; then the finalists by their mean, the others as far as they
    came, by their loss there."""
    finalists, winner = search.finalists, search.winner

    def key(trial: int) -> tuple[Any, ...]:
        losses = search.by_rung(trial)
        if trial in finalists:
            mean = fmean(search.losses_of(trial))
            return (trial != winner, 0, mean if math.isfinite(mean) else math.inf)
        last = max(losses, default=0)
        return (True, 1, -last, losses.get(last, math.inf), trial)

    return sorted(range(len(search.runs)), key=key)


def leaderboard(search: Search) -> Iterator[dict[str, Any]]:
    """A row a trial, the best first."""
    names, finalists, winner = [*search.plan.space.axes], search.finalists, search.winner
    for number, trial in enumerate(ranked(search), 1):
        run, losses, seeds = search.runs[trial], search.by_rung(trial), dict[int, Any]()
        complete = search.plan.halving.rungs in losses
        state = "ended" if run.ended else "complete" if complete else "retired"
        if trial in finalists:
            state = "winner" if trial == winner else "finalist"
            seeds = {own.seed: _finite(own.loss) for own in search.seeds_of(trial)}
        yield {
            "place": number,
            "trial": trial,
            "state": state,
            "params": run.recipe.values(names),
            "rung": max(losses, default=0),
            "steps": run.taken,
            "total": run.total,
            "losses": losses,
            "ended": run.ended,
        } | ({"seeds": seeds} if seeds else {})


def curves(search: Search) -> Iterator[dict[str, Any]]:
    """A row a trial, with its curves; the default configuration's is the last."""

    def curve(run: Run) -> dict[str, Any]:
        return {"training": [_finite(loss) for loss in run.curve], "selection": run.losses}

    for trial in (*range(len(search.runs)), DEFAULT):
        first, *others = search.seeds_of(trial)
        row = {"trial": trial, "seed": first.seed, **curve(first)}
        yield row | ({"seeds": {run.seed: curve(run) for run in others}} if others else {})


def _finite(value: float) -> float | None:
    """A number as JSON has it, which knows no NaN."""
    return value if math.isfinite(value) else None


def finalist_table(search: Search) -> Table:
    """The finalists and the default configuration: what they are, their losses over the seeds."""
    names, rows = [*search.plan.space.axes], list[list[str]]()

    def short(value: Any) -> str:
        return " ".join(value) if isinstance(value, list) else f"{value:.3g}"

    for trial in (*ranked(search)[: len(search.finalists)], DEFAULT):
        values = search.seeds_of(trial)[0].recipe.values(names).items()
        what = " · ".join(f"{name} {short(value)}" for name, value in values)
        numbers = [f"{value:.4f}" for value in spread(search.losses_of(trial)).values()]
        tested = search.tested.get(trial)
        rows.append([str(trial), what, *numbers, f"{fmean(tested):.4f}" if tested else ""])
    return table("Finalists", ("trial", "what it is", "mean", "min", "max", "sd", "test"), rows)
