"""What an update is made of: rank, alpha, dropout."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TypeGuard


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """What one update is made of.

    Args:
        r: rank, at least 1.
        alpha: numerator of the scaling, above 0.
        dropout: probability in [0, 1) of dropping an input feature of the update in training.
        rslora: scale by `alpha / √r` instead of `alpha / r` (Kalajdzievski 2023, "A Rank
            Stabilization Scaling Factor for Fine-Tuning with LoRA").

    Raises:
        ValueError: naming each argument that is out of range.
    """

    r: int
    alpha: float
    dropout: float
    rslora: bool = False

    def __post_init__(self) -> None:
        faults: list[str] = []
        if type(self.r) is not int or self.r < 1:
            faults.append(f"r must be an integer of at least 1, got {self.r!r}")
        if not is_finite(self.alpha) or self.alpha <= 0:
            faults.append(f"alpha must be a finite number above 0, got {self.alpha!r}")
        if not is_finite(self.dropout) or not 0 <= self.dropout < 1:
            faults.append(f"dropout must be in [0, 1), got {self.dropout!r}")
        if faults:
            raise ValueError("; ".join(faults) + ".")

    @property
    def scaling(self) -> float:
        """The factor `s` of the formula."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


def is_finite(value: object) -> TypeGuard[float]:
    """Whether this is a number that a float can hold: no bool, NaN, infinity or huge integer."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max
