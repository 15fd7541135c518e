"""The space of a search: what may vary, and between what."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import lora

from .trials import Recipe, Values, names_of

INTEGERS = ("r", "steps", "epochs")
NAMES = "lr b_ratio r alpha_over_r dropout weight_decay steps epochs targets".split()


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, as likely in each order of magnitude."""

    low: float
    high: float


@dataclass(frozen=True)
class Space:
    """What a trial may have: by name a `Range`, or a tuple of choices; of one it is fixed."""

    axes: Mapping[str, Any]

    @property
    def size(self) -> float:
        """How many different trials there are; infinite where a range of reals varies."""
        try:
            return math.prod(map(len, self._choices()))
        except ValueError:
            return math.inf

    def all(self) -> Iterator[Values]:
        """All trials of a space that is finite, in order."""
        for values in product(*self._choices()):
            yield dict(zip(self.axes, values, strict=True))

    def _choices(self) -> Iterator[Any]:
        for name, axis in self.axes.items():
            if isinstance(axis, Range) and name not in INTEGERS:
                raise ValueError(f"{name} is not finite")
            yield range(int(axis.low), int(axis.high) + 1) if isinstance(axis, Range) else axis

    def ends(self, name: str, usual: float) -> tuple[float, float]:
        """The least and the largest number that a trial may have; `usual` where none varies."""
        axis = self.axes.get(name, (usual,))
        numbers = (axis.low, axis.high) if isinstance(axis, Range) else axis
        return min(numbers), max(numbers)

    def room(self, usual: Recipe, side: int = 1) -> lora.LoRAConfig:
        """The adapter in whose place every trial's fits, of ranks up to `side`, and the usual."""
        adapter, axis = usual.adapter, self.axes.get("r", ())
        ranks = [adapter.r, *(adapter.rank_pattern or {}).values()]
        ranks += [min(int(axis.high), side)] if isinstance(axis, Range) else axis
        targets = usual.values(["targets"])["targets"]
        targets += [name for text in self.axes.get("targets", ()) for name in names_of(text)]
        return replace(
            adapter,
            r=max((rank for rank in ranks if rank <= side), default=1),
            targets=tuple(dict.fromkeys(targets)),
            dropout=max(adapter.dropout, self.ends("dropout", adapter.dropout)[1]),
            rank_pattern=None,
            alpha_pattern=None,
            seed=0,
        )


def read(given: object, trials: int, usual: Recipe) -> Space:
    """The space that an option describes.

    A list is a choice, `{low: …, high: …}` a range on a logarithmic scale, all else fixed.

    Raises:
        ValueError: listing all that is empty or contradictory.
    """
    if not isinstance(given, Mapping) or not given:
        raise ValueError(
            "The space is empty: give what varies, such as space: {lr: {low: 1.0e-4, high: 1.0e-1},"
            f" r: [4, 8]}}. It may have {', '.join(NAMES)}."
        )
    faults = [f"{name} is none of {', '.join(NAMES)}" for name in given if name not in NAMES]
    axes: dict[str, Any] = {}
    for name in [name for name in given if name in NAMES]:
        try:
            axes[name] = _axis(name, given[name], usual)
        except (ValueError, TypeError) as error:
            faults.append(str(error).rstrip("."))
    if {"steps", "epochs"} <= {*given}:
        faults.append("steps and epochs exclude each other")
    space = Space(axes)
    if not faults and space.size == 1:
        faults.append("nothing in it varies")
    elif not faults and space.size < trials:
        faults.append(f"it has {space.size:,.0f} different trials, and {trials:,} are asked for")
    if faults:
        raise ValueError(f"The space is contradictory: {'; '.join(faults)}.")
    return space


def _axis(name: str, given: Any, usual: Recipe) -> Any:
    """What one name may be; each end and each choice is tried in a recipe, which raises."""
    values: tuple[Any, ...]
    if isinstance(given, Mapping):
        if {*given} != {"low", "high"} or name == "targets":
            raise ValueError(f"{name} must have low and high and nothing else, got {given!r:.80}")
        values = (given["low"], given["high"])
        if not 0 < values[0] < values[1]:
            raise ValueError(f"{name} needs 0 < low < high, got {values[0]} and {values[1]}")
    else:
        choices = given if isinstance(given, list) else [given]
        if name == "targets":
            choices = [json.dumps(c) if isinstance(c, list) else str(c) for c in choices]
        values = tuple(choices)
    for value in values:
        usual.varied({name: value})
    if isinstance(given, Mapping):
        return Range(*values)
    if len({frozenset(names_of(v)) if name == "targets" else v for v in values}) < len(values):
        raise ValueError(f"{name} has a choice twice: {given!r:.80}")
    if not values:
        raise ValueError(f"{name} has no choice")
    return values
