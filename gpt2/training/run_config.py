"""When a run looks at its validation data, when it stops, and when it is kept on disk."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gpt2.config import is_number
from gpt2.files import listed


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What is done around the steps; nothing here changes a step.

    Args:
        eval_every: steps between two evaluations; None for once an epoch. The last step is
            evaluated too.
        patience: evaluations in a row without a lower loss after which the run stops; None for
            never.
        min_delta: by how much, in nats, a loss must be lower to count for `patience`.
        save_every: steps between two snapshots, or seconds as "30s"; None for none.
        folder: where snapshots are kept.

    Raises:
        ValueError: naming each field that is out of range.
    """

    eval_every: int | None = None
    patience: int | None = None
    min_delta: float = 0.0
    save_every: int | str | None = None
    folder: str | Path | None = None

    def __post_init__(self) -> None:
        faults = [
            f"{name} must be an integer of at least 1, or None, got {value!r}"
            for name in ("eval_every", "patience")
            if (value := getattr(self, name)) is not None and (type(value) is not int or value < 1)
        ]
        if not is_number(self.min_delta) or not 0 <= self.min_delta < math.inf:
            faults.append(f"min_delta must be finite and at least 0, got {self.min_delta!r}")
        if self.save_every is not None and self._steps is None and self._seconds is None:
            faults.append(
                "save_every must be steps, such as 500, or seconds, such as '30s', "
                f"got {self.save_every!r}"
            )
        if self.save_every is not None and self.folder is None:
            faults.append("save_every needs a folder")
        if faults:
            raise ValueError(f"RunConfig: {listed(faults)}.")

    def is_save_due(self, step: int, seconds: float) -> bool:
        """Whether to keep a snapshot after this step, so long after the last."""
        if self._steps is not None:
            return step % self._steps == 0
        return self._seconds is not None and seconds >= self._seconds

    def is_save_step(self, step: int) -> bool:
        """Whether a snapshot is due after this step, whatever the time."""
        return self._steps is not None and step % self._steps == 0

    @property
    def _steps(self) -> int | None:
        steps = self.save_every
        steps = int(steps) if isinstance(steps, str) and re.fullmatch(r"\d{1,15}", steps) else steps
        return steps if type(steps) is int and steps > 0 else None

    @property
    def _seconds(self) -> float | None:
        text = self.save_every if isinstance(self.save_every, str) else ""
        found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?s", text)
        return float(found[1]) if found and float(found[1]) > 0 else None


def waited(losses: Iterable[float], min_delta: float) -> int:
    """How many losses at the end are not lower, by more than `min_delta`, than those before."""
    lowest, since = math.inf, 0
    for loss in losses:
        since += 1
        if loss < lowest - min_delta:  # NaN is never
            lowest, since = loss, 0
    return since


def lowest(evaluated: dict[int, float]) -> int | None:
    """The step of the lowest loss, the first of equal ones; None where none is finite."""
    finite = {step: loss for step, loss in evaluated.items() if math.isfinite(loss)}
    return min(finite, key=finite.__getitem__, default=None)
