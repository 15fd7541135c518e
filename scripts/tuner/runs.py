"""What is known of one training of a search.

Shapes: P parameters of a slot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from ..runs.recipe import Recipe

DEFAULT = "default"  # the configuration that takes no part


@dataclass(frozen=True)
class Place:
    """Where a training is between two waves: parameters and AdamW's moments, `(P,)` each.

    The moments of a training that is over are empty, `(0,)`.
    """

    flat: Tensor
    first: Tensor
    second: Tensor


@dataclass(kw_only=True)
class Run:
    """A trial's training under a seed.

    Args:
        trial: its number, or `DEFAULT`.
        recipe: how it is trained; its seed is the run's.
        total: steps of its whole schedule.
        curve: the training loss of each step.
        losses: on the selection data, by step; before the last step, of a copy that cooled down.
        ended: why it came to an end of its own, if it did.
        place: where it is, if it goes on.
    """

    trial: int | str
    recipe: Recipe
    total: int
    curve: list[float] = field(default_factory=list[float])
    losses: dict[int, float] = field(default_factory=dict[int, float])
    ended: str | None = None
    place: Place | None = None

    @property
    def seed(self) -> int:
        """Of its order of data, dropout and first A."""
        return self.recipe.training.seed

    @property
    def taken(self) -> int:
        """Steps that it has taken, the one included that failed."""
        return len(self.curve)

    @property
    def is_over(self) -> bool:
        """Whether its schedule has come to its end."""
        return self.taken >= self.total

    @property
    def loss(self) -> float:
        """The last on the selection data; NaN where it ended."""
        return math.nan if self.ended or not self.losses else self.losses[max(self.losses)]
