"""What a search does, before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..runs.recipe import Recipe
from . import proposals
from .halving import Halving
from .space import Space, Values


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is searched, and how.

    Args:
        space: what varies.
        usual: what does not; it is trained too, and takes no part.
        halving: the rungs.
        slots: trainings at a time.
        sampler: "random" or "tpe".
        finalists: trials of the last rung that run again.
        seeds: of each finalist, the first being that of all trials.
    """

    space: Space
    usual: Recipe
    halving: Halving
    slots: int
    sampler: str
    finalists: int
    seeds: int

    @property
    def seed(self) -> int:
        """Of all trials in the rungs, and of the proposals."""
        return self.usual.training.seed

    @property
    def all_seeds(self) -> list[int]:
        """Of the finalists and of the usual configuration."""
        return [self.seed + i for i in range(self.seeds)]

    @cached_property
    def at_random(self) -> Sequence[Values]:
        """Of all trials at once, where none depends on another."""
        how = {"sampler": "random", "seed": self.seed, "wave": 0}
        return proposals.propose(self.space, self.halving.trials, [], **how)
