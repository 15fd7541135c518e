"""What seeds can tell apart: the spread of one configuration, and pairs of two. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

# Student's t, 97.5 %, for 1, 2, … degrees of freedom.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
TEST = "Configurations are told apart by Student's paired t-test over the seeds (two-sided, 95 %)."
WORDS = {  # of the winner, by what the last data says of it
    "better": "On the test data it is better than the default configuration.",
    "worse": "On the test data it is WORSE than the default configuration.",
    "alike": "On the test data it cannot be told apart from the default configuration.",
    None: "There is no test data, or the default configuration ended: they are not compared.",
}


def said(
    winner: int, alike: Sequence[int], finalists: int, seeds: int, on_test: str | None, test: str
) -> str:
    """What may be said of a search's winner, and what may not.

    Args:
        winner: the finalist with the lowest mean loss.
        alike: the finalists that cannot be told apart from it.
        finalists: how many there are.
        seeds: of each.
        on_test: what the last data says of it, a key of `WORDS`.
        test: how configurations are told apart.
    """
    if alike:
        others = ", ".join(map(str, alike))
        told = f"Of the finalists trial {winner} has the lowest mean loss; it cannot be told apart "
        told += f"from {others} over {seeds} seeds."
    elif finalists > 1:
        told = f"Trial {winner} is the best of the finalists over {seeds} seeds."
    else:
        told = f"Trial {winner} is the only finalist."
    return f"{told} {WORDS[on_test]} {test}"


def spread(losses: Sequence[float]) -> dict[str, float]:
    """Mean, lowest, highest, and standard deviation of a configuration's losses over seeds.

    All are NaN where a seed's training came to an end of its own.
    """
    if not all(map(math.isfinite, losses)):
        return dict.fromkeys(("mean", "min", "max", "sd"), math.nan)
    return {
        "mean": fmean(losses),
        "min": min(losses),
        "max": max(losses),
        "sd": stdev(losses) if len(losses) > 1 else math.nan,
    }


def told_apart(one: Sequence[float], other: Sequence[float]) -> bool:
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
    return [n for n, own in losses.items() if n != best and not told_apart(own, losses[best])]
