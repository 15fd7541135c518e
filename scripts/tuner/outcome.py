"""The outcome of a search: the winner, and the files that stay."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

import gpt2
import lora

from ..runs import folder
from . import sampler
from .search import Search
from .trials import DEFAULT, Trial

# Student's t, 97.5 %, for 1, 2, … degrees of freedom.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
TEST = "The test is Student's paired t-test over the seeds (two-sided, 95 %)."
ON_TEST = {
    "better": "is better than",
    "worse": "is WORSE than",
    "alike": "is not distinguishable from",
    None: "is not compared with",
}
NOT_OF_ONE = "space trials slots rungs keep sampler finalists seeds device".split()
NOT_OF_ONE += "score score_prompts choose_by".split()


def write(
    search: Search,
    options: Mapping[str, Any],
    root: Path,
    facts: Mapping[str, Any],
    measure: Callable[[gpt2.GPT2], dict[str, Any]],
) -> None:
    """Write the files; the record, with the winner's measures, comes last."""
    best, winner = root / folder.WINNER, search.runs[search.winner]
    with search.waves.carried(winner) as model:
        lora.save(model, best, notes={"command": f"train_qa.py --config {folder.TRAINED_BY}"})
        stats = measure(model)

    given = {name: value for name, value in options.items() if name not in NOT_OF_ONE}
    given |= winner.recipe.values(["lr", "steps", "epochs", "weight_decay", "b_ratio"])
    given["lora"] |= winner.recipe.values(["r", "alpha", "dropout", "targets"])
    text = yaml.safe_dump({**given, "eval_every": winner.total}, sort_keys=False)
    (best / folder.TRAINED_BY).write_text(text, "utf-8")
    rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in leaderboard(search)]
    folder.write_whole(root / folder.LEADERBOARD, "".join(rows))
    sampler.write_study(root / folder.STUDY, search.plan.space, search.known())
    folder.write(root, {"kind": "search", **facts, **results(search), **stats})


def differ(one: list[float], other: list[float]) -> bool:
    """Whether losses of equal seeds differ beyond noise."""
    ended = [not all(map(math.isfinite, losses)) for losses in (one, other)]
    if any(ended):
        return not all(ended)
    differences = [a - b for a, b in zip(one, other, strict=True)]
    if len(differences) < 2:
        return False
    error = stdev(differences) / math.sqrt(len(differences))
    return abs(fmean(differences)) > T[min(len(differences) - 1, len(T)) - 1] * error


def results(search: Search) -> dict[str, Any]:
    """The record's part: the winner, and what may be claimed of it."""
    winner, finalists, seeds = search.winner, search.finalists, search.plan.seeds
    best, others = search.losses_of(winner), [n for n in finalists if n != winner]
    others = [n for n in others if not differ(search.losses_of(n), best)]
    reason = "has the lowest mean loss"
    seeds_or = f"over {seeds} seeds"
    if search.by_score:
        reason = "has the highest score"
        seeds_or = f"by {search.score} {seeds_or}"
        low, _ = search.scored[winner]["interval"]
        others = [n for n in finalists if n != winner and n in search.scored]
        others = [n for n in others if search.scored[n]["value"] >= low]
    claim = f"Trial {winner} is the best of the finalists {seeds_or}."
    if others:
        names = ", ".join(map(str, others))
        claim = f"Of the finalists trial {winner} {reason}; it is not distinguishable"
        claim += f" from {names} {seeds_or}."
    elif len(finalists) == 1:
        claim = f"Trial {winner} is the only finalist."

    test, tests = None, [search.tested[n] for n in (winner, DEFAULT) if n in search.tested]
    if len(tests) == 2:
        lower = "better" if sum(tests[0]) < sum(tests[1]) else "worse"
        test = lower if differ(*tests) else "alike"

    rungs = enumerate(zip(search.plan.shares, search.rungs, strict=True), 1)
    return {
        "rungs": [
            {"rung": number, "share": share, "alive": len(trials), "trials": trials}
            for number, (share, trials) in rungs
        ],
        "adapter_steps": search.done,
        "winner": {"trial": winner, **_configuration(search, winner)},
        "default": _configuration(search, DEFAULT),
        "finalists": finalists,
        "indistinguishable": others,
        "winner_on_test": test,
        "verdict": f"{claim} On the test data it {ON_TEST[test]} the default configuration. {TEST}",
    }


def _configuration(search: Search, trial: Trial) -> dict[str, Any]:
    tested, recipe = search.tested.get(trial), search.seeds_of(trial)[0].recipe
    return {
        "params": recipe.values([*search.plan.space.axes]),
        "selection": _over_seeds(search, search.losses_of(trial)),
        "score": search.scored.get(trial),
        "test": tested and _over_seeds(search, tested),
    }


def _over_seeds(search: Search, losses: list[float]) -> dict[str, Any]:
    seeds = enumerate(losses, search.plan.usual.training.seed)
    return {"seeds": {seed: _finite(x) for seed, x in seeds}, "mean": _finite(fmean(losses))}


def leaderboard(search: Search) -> Iterator[dict[str, Any]]:
    """A row a trial: the winner, finalists, others by rung."""
    names, finalists, winner = [*search.plan.space.axes], search.finalists, search.winner

    def key(trial: int) -> tuple[Any, ...]:
        losses, final = search.by_rung(trial), trial in finalists
        last = max(losses, default=0)
        loss = fmean(search.losses_of(trial)) if final else losses.get(last, math.nan)
        loss = loss if math.isfinite(loss) else math.inf
        return (trial != winner, not final, -last, loss, trial)

    for number, trial in enumerate(sorted(range(len(search.runs)), key=key), 1):
        run, losses, seeds = search.runs[trial], search.by_rung(trial), dict[str, Any]()
        complete = search.plan.rungs in losses
        state = "ended" if run.ended else "complete" if complete else "retired"
        if trial in finalists:
            state = "winner" if trial == winner else "finalist"
            seeds = _over_seeds(search, search.losses_of(trial))
            seeds |= {"score": search.scored[trial]} if trial in search.scored else {}
        yield {
            "place": number,
            "trial": trial,
            "state": state,
            "params": run.recipe.values(names),
            "rung": max(losses, default=0),
            "steps": run.taken,
            "losses": losses,
            "ended": run.ended,
            **seeds,
        }


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
