"""The space of a search: what may vary, and between what."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

INTEGERS = ("r", "steps", "epochs")
BOUNDS = {  # the least value, and whether it is one
    "lr": (0.0, False),
    "b_ratio": (0.0, False),
    "r": (1, True),
    "alpha_over_r": (0.0, False),
    "dropout": (0.0, True),
    "weight_decay": (0.0, True),
    "steps": (1, True),
    "epochs": (1, True),
}
NAMES = (*BOUNDS, "targets")
LARGEST = sys.float_info.max  # an integer may be above it, and no float is made of that
NEAREST = 1e-6  # share by which the bounds of reals differ at least
Value = float | int | str
Values = Mapping[str, Value]
"""What a trial has of the space by name; several targets stand in one text, as JSON."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, as likely in each order of magnitude."""

    low: float
    high: float


@dataclass(frozen=True)
class Space:
    """What a trial may have: by name a `Range`, or a tuple of choices; of one it is fixed."""

    axes: Mapping[str, Range | tuple[Value, ...]]

    @property
    def size(self) -> float:
        """How many different trials there are; infinite where a range of reals varies."""
        found = 1.0
        for name, axis in self.axes.items():
            if isinstance(axis, Range):
                found *= axis.high - axis.low + 1 if name in INTEGERS else math.inf
            else:
                found *= len(axis)
        return found

    def all(self) -> Iterator[dict[str, Value]]:
        """All trials of a space that is finite, in order."""
        for values in product(*(_values(axis) for axis in self.axes.values())):
            yield dict(zip(self.axes, values, strict=True))

    def ends(self, name: str, usual: float) -> tuple[float, float]:
        """The least and the largest number that a trial may have; `usual` where none varies."""
        axis = self.axes.get(name, (usual,))
        numbers: Any = (axis.low, axis.high) if isinstance(axis, Range) else axis
        return min(numbers), max(numbers)

    def targets(self) -> list[str]:
        """All targets that some trial has; none where they do not vary."""
        axis: Any = self.axes.get("targets", ())
        return list(dict.fromkeys(name for text in axis for name in names_of(text)))


def names_of(text: str) -> list[str]:
    """The targets that a value stands for."""
    found = json.loads(text) if text.startswith("[") else text
    return [found] if isinstance(found, str) else found


def read(given: object, trials: int) -> Space:
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
    axes: dict[str, Range | tuple[Value, ...]] = {}
    for name, value in given.items():
        if name in NAMES:
            found = _axis(str(name), value)
            if isinstance(found, list):
                faults += found
            else:
                axes[str(name)] = found
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


def _axis(name: str, given: object) -> Range | tuple[Value, ...] | list[str]:
    """What one name may be, or what is wrong with it."""
    if isinstance(given, Mapping):
        return _range(name, given)
    choices: list[Any] = given if isinstance(given, list) else [given]
    if not choices:
        return [f"{name} has no choice"]
    if name == "targets":
        choices = [_text(choice) for choice in choices]
        faults = [f"targets must be names or lists of names, got {given!r:.80}"]
        faults = faults if None in choices else []
    else:
        faults = [fault for choice in choices for fault in _faults(name, choice)]
    if not faults and len({_same(name, choice) for choice in choices}) < len(choices):
        faults.append(f"{name} has a choice twice: {given!r:.80}")
    return faults or tuple(choices)


def _same(name: str, choice: Any) -> Any:
    """What is equal for choices that make the same trial."""
    return frozenset(names_of(choice)) if name == "targets" else choice


def _range(name: str, given: Mapping[Any, Any]) -> Range | list[str]:
    if name == "targets":
        return ["targets are no range: give a list"]
    if {*given} != {"low", "high"}:
        return [f"{name} must have low and high and nothing else, got {dict(given)!r:.80}"]
    low, high = given["low"], given["high"]
    if faults := [*_faults(name, low), *_faults(name, high)]:
        return faults
    if not 0 < low < high:
        return [f"{name} needs 0 < low < high, got {low} and {high}"]
    if name not in INTEGERS and high < low * (1 + NEAREST):
        return [f"{name} has {low} and {high} for bounds, which are as good as one: give a number"]
    return Range(low, high)


def _faults(name: str, value: object) -> list[str]:
    """What is wrong with a number."""
    low, included = BOUNDS[name]
    kind = "an integer" if name in INTEGERS else "a finite number"
    said = f"{name} must be {kind} {'of at least' if included else 'above'} {low:g}"
    if name == "dropout":
        said += " and below 1"
    right = type(value) is int or (type(value) is float and name not in INTEGERS)
    if right:
        right = low <= value <= LARGEST and (included or value > low)  # pyright: ignore
        right = right and not (name == "dropout" and value >= 1)  # pyright: ignore
    return [] if right else [f"{said}, got {value!r:.80}"]


def _text(targets: object) -> str | None:
    """Targets as one text; None where they are none."""
    if isinstance(targets, str) and targets and targets[0] != "[":
        return targets
    if isinstance(targets, list) and targets and all(t and isinstance(t, str) for t in targets):
        return json.dumps(targets)
    return None


def _values(axis: Range | tuple[Value, ...]) -> Any:
    return range(int(axis.low), int(axis.high) + 1) if isinstance(axis, Range) else axis
