"""Successive halving: how many trials go on, how far, and which.

All trials of a rung have done the same share of their schedules. A copy whose learning rate has
fallen to zero is judged: at a high rate a trial looks worse than it is.

Sources: Jamieson and Talwalkar 2016, arXiv 1502.07943; for the copies Hägele et al. 2024,
arXiv 2405.18392.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import gpt2

from .trials import Recipe, Space

MOST = 100_000  # trials, held in memory


@dataclass(frozen=True, kw_only=True)
class Halving:
    """Rungs, from 0: one in `keep` goes on, and trains `keep` times as far."""

    trials: int
    rungs: int
    keep: int
    cooldown: int = 8  # a copy's part of the steps, as 1 / n; or 0

    @property
    def alive(self) -> list[int]:
        """Trials by rung, if none ends early."""
        return [max(1, self.trials // self.keep**rung) for rung in range(self.rungs)]

    @property
    def shares(self) -> list[float]:
        """The share of its schedule that a trial has at each rung's end."""
        return [1 / self.keep**n for n in reversed(range(self.rungs))]

    def step(self, rung: int, total: int) -> int:
        """The last step in a rung, of `total`."""
        return total // self.keep ** (self.rungs - 1 - rung)

    def steps(self, rung: int, total: int) -> int:
        """The steps in a rung, with the copy's."""
        before = self.step(rung - 1, total) if rung else 0
        return self.step(rung, total) - before + self.cooldown_steps(rung, total)

    def cooldown_steps(self, rung: int, total: int) -> int:
        """The steps of a copy; none in the last rung."""
        if not self.cooldown or rung + 1 == self.rungs:
            return 0
        return max(1, self.step(rung, total) // self.cooldown)

    def survivors(self, losses: Mapping[int, float], rung: int) -> list[int]:
        """The trials that a rung keeps, the best first."""
        finite = [trial for trial, loss in losses.items() if math.isfinite(loss)]
        best = sorted(finite, key=lambda trial: (losses[trial], trial))
        return best[: self.alive[rung + 1]] if rung + 1 < self.rungs else best

    def faults(self, least: int, finalists: int, warmup: int = 0) -> list[str]:
        """What does not fit a schedule of `least` steps."""
        whole, first = self.keep ** (self.rungs - 1), self.step(0, least)
        faults: list[str] = []
        if whole > least:
            most = 1 + int(math.log(least, self.keep) + 1e-9)
            fit = f"take {whole:,} steps and there are {least:,}: at most {most} fit"
            faults.append(f"{self.rungs} rungs, each {self.keep} times as long, {fit}")
        elif warmup >= first and self.cooldown_steps(0, least):
            end = f"the first ends after {first:,} steps"
            faults.append(f"{end} and the warm-up takes {warmup:,}")
        if self.trials < whole:
            faults.append(f"{self.trials} trials leave none for the last of {self.rungs} rungs")
        elif finalists > self.alive[-1]:
            faults.append(f"there are {finalists} finalists, and {self.alive[-1]} in the last rung")
        return faults


@dataclass(frozen=True, kw_only=True)
class Plan(Halving):
    """What is searched, and how."""

    space: Space  # what varies
    usual: Recipe  # the default configuration
    slots: int  # trainings at a time
    sampler: str  # "random" or "tpe"
    finalists: int  # of the last rung
    seeds: int  # of each finalist

    def check(self, train: gpt2.Dataset) -> None:
        """Raise where it does not fit the data."""
        if self.trials > MOST:
            raise ValueError(f"trials must be at most {MOST:,}, got {self.trials:,}.")
        if self.sampler == "tpe" and self.trials <= self.slots:
            raise ValueError(
                f"tpe learns from wave to wave, and {self.trials} trials are one wave: give fewer "
                f"slots than {self.slots}, or take random."
            )
        shortest = self.usual
        for name in {"steps", "epochs"} & {*self.space.axes}:
            shortest = shortest.varied({name: int(self.space.ends(name, 1)[0])})
        least = gpt2.total_steps(train, shortest.training)
        if faults := self.faults(least, self.finalists, shortest.training.warmup_steps or 0):
            raise ValueError(f"The rungs do not fit: {'; '.join(faults)}.")

    def cost(self, total: int) -> int:
        """Adapter-steps, if each training has `total` steps."""
        again = self.finalists * (self.seeds - 1) + self.seeds
        rungs = enumerate(self.alive)
        return again * total + sum(n * self.steps(rung, total) for rung, n in rungs)

    def message(self) -> str:
        """The plan, for the user."""
        alive = "/".join(map(str, self.alive))
        percent = "/".join(f"{100 * share:.3g}" for share in self.shares)
        return (
            f"{alive} trials train to {percent} % of their schedules, {self.slots} at a time; then "
            f"{self.finalists} finalists and the default configuration over {self.seeds} seeds."
        )
