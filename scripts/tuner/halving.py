"""Successive halving, all of a rung at once: how many go on, how far, and who. No torch here.

All trials of a rung have done the same share of their own schedules, and are judged after the
learning rate of a copy has fallen to zero; else a high one looks worse than it ends. Those with the
lowest losses go on.

Sources: Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter
Optimization"; for the copies Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond
Fixed Training Durations".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Halving:
    """A plan of rungs, counted from 0: one in `keep` goes on, and trains `keep` times as far.

    In one in `cooldown` of the steps so far the rate of a copy falls; 0 is for no copies.
    """

    trials: int
    rungs: int
    keep: int
    cooldown: int = 8

    @property
    def alive(self) -> list[int]:
        """How many trials each rung has, where none ends early."""
        return [max(1, self.trials // self.keep**rung) for rung in range(self.rungs)]

    def step(self, rung: int, total: int) -> int:
        """The step after which a training of `total` steps rests in a rung."""
        return total // self.keep ** (self.rungs - 1 - rung)

    def steps(self, rung: int, total: int) -> int:
        """The steps that a rung takes of such a training, its copy's among them."""
        before = self.step(rung - 1, total) if rung else 0
        return self.step(rung, total) - before + self.cooldown_steps(rung, total)

    def cooldown_steps(self, rung: int, total: int) -> int:
        """The steps in which a copy's learning rate falls; none in the last rung."""
        if not self.cooldown or rung + 1 == self.rungs:
            return 0
        return max(1, self.step(rung, total) // self.cooldown)

    def going_on(self, losses: Mapping[int, float], rung: int) -> list[int]:
        """The trials that go on from a rung, the best first; of equal losses the earlier trial.

        A trial whose loss is not finite ended early, and never goes on.
        """
        finite = [trial for trial, loss in losses.items() if math.isfinite(loss)]
        best = sorted(finite, key=lambda trial: (losses[trial], trial))
        return best[: self.alive[rung + 1]] if rung + 1 < self.rungs else best

    def faults(self, least: int, finalists: int) -> list[str]:
        """What is contradictory in the plan, if the shortest schedule has `least` steps."""
        whole, faults = self.keep ** (self.rungs - 1), list[str]()
        if whole > least:
            most = 1 + int(math.log(least, self.keep) + 1e-9)
            fit = f"take {whole:,} steps and there are {least:,}: at most {most} fit"
            faults.append(f"{self.rungs} rungs, each {self.keep} times as long, {fit}")
        if self.trials < whole:
            faults.append(f"{self.trials} trials leave none for the last of {self.rungs} rungs")
        elif finalists > self.alive[-1]:
            faults.append(f"there are {finalists} finalists, and {self.alive[-1]} in the last rung")
        return faults
