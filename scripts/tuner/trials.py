"""Trials: an adapter's recipe, its run, the space of recipes."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from torch import Tensor

import gpt2
import lora

INTEGERS = ("r", "steps", "epochs")
NAMES = "lr b_ratio r alpha_over_r dropout weight_decay steps epochs targets".split()
DEFAULT = "default"  # configuration
Trial = int | str  # its number, or `DEFAULT`
Values = Mapping[str, float | int | str]
"""A trial's values by name; targets as JSON."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An adapter, its training, and B's learning rate over A's (LoRA+)."""

    adapter: lora.LoRAConfig
    training: gpt2.TrainConfig
    b_ratio: float

    def seeded(self, seed: int) -> "Recipe":
        """The same with another seed."""
        adapter, training = (replace(part, seed=seed) for part in (self.adapter, self.training))
        return replace(self, adapter=adapter, training=training)

    def varied(self, values: Values) -> "Recipe":
        """The same with a trial's values; where r varies, alpha / r stays."""
        training: dict[str, Any] = dict(values)
        adapter = {n: training.pop(n) for n in ("dropout", "targets", "r") if n in values}
        if "targets" in adapter:
            adapter["targets"] = tuple(json.loads(adapter["targets"]))
        if {"r", "alpha_over_r"} & {*values}:
            ratio = training.pop("alpha_over_r", self.adapter.alpha / self.adapter.r)
            adapter["alpha"] = ratio * adapter.get("r", self.adapter.r)
        b_ratio = training.pop("b_ratio", self.b_ratio)
        if not (b_ratio > 0 and math.isfinite(b_ratio)):
            raise ValueError(f"b_ratio must be finite and above 0, got {b_ratio}.")
        for name, other in (("steps", "epochs"), ("epochs", "steps")):
            if name in values:
                training[other] = None
        return Recipe(
            adapter=replace(self.adapter, **adapter),
            training=replace(self.training, **training),
            b_ratio=b_ratio,
        )

    def values(self, names: list[str]) -> dict[str, Any]:
        """Its values by name."""
        adapter, targets = self.adapter, self.adapter.targets
        values = {**vars(self.training), **vars(adapter), "b_ratio": self.b_ratio}
        values["alpha_over_r"] = adapter.alpha / adapter.r
        values["targets"] = [targets] if isinstance(targets, str) else list(targets)
        return {name: values[name] for name in names}


@dataclass(kw_only=True)
class Run:
    """A trial's training under a seed."""

    trial: Trial
    recipe: Recipe
    total: int  # steps
    curve: list[float] = field(default_factory=list[float])  # training losses
    losses: dict[int, float] = field(default_factory=dict[int, float])  # by step, of copies
    ended: str | None = None  # why it ended early
    position: tuple[Tensor, Tensor, Tensor] | None = None  # parameters, moments

    @property
    def taken(self) -> int:
        """Steps taken, with one that failed."""
        return len(self.curve)

    @property
    def loss(self) -> float:
        """The last validation loss; NaN where it ended early."""
        return math.nan if self.ended or not self.losses else self.losses[max(self.losses)]


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, log-uniform."""

    low: float
    high: float


@dataclass(frozen=True)
class Space:
    """By name a `Range`, or a tuple of choices."""

    axes: Mapping[str, Any]

    @property
    def choices(self) -> list[Any] | None:
        """All choices by name; None where a real varies."""
        choices = list[Any]()
        for name, axis in self.axes.items():
            if not isinstance(axis, Range):
                choices.append(axis)
            elif name in INTEGERS:
                choices.append(range(int(axis.low), int(axis.high) + 1))
            else:
                return None
        return choices

    def all(self) -> Iterator[Values]:
        """All trials of a finite space, in order."""
        for values in product(*self.choices or ()):
            yield dict(zip(self.axes, values, strict=True))

    def ends(self, name: str, usual: float) -> tuple[float, float]:
        """The lowest and highest number, or `usual`."""
        axis = self.axes.get(name, (usual,))
        numbers = (axis.low, axis.high) if isinstance(axis, Range) else axis
        return min(numbers), max(numbers)

    def room(self, usual: Recipe) -> lora.LoRAConfig:
        """An adapter as large as any trial's and the usual."""
        adapter, targets = usual.adapter, usual.values(["targets"])["targets"]
        targets += [name for text in self.axes.get("targets", ()) for name in json.loads(text)]
        ranks = [*(adapter.rank_pattern or {}).values(), self.ends("r", adapter.r)[1], adapter.r]
        return replace(
            adapter,
            r=int(max(ranks)),
            targets=tuple(dict.fromkeys(targets)),
            dropout=max(adapter.dropout, self.ends("dropout", adapter.dropout)[1]),
            rank_pattern=None,
            alpha_pattern=None,
            seed=0,
        )


def read_space(given: Mapping[str, Any], trials: int, usual: Recipe) -> Space:
    """The space of an option; a ValueError lists all faults."""
    if not given:
        raise ValueError(
            "The space is empty: give what varies, such as {lr: {low: 0.01, high: 0.1}, r: [4]}, "
            f"of {', '.join(NAMES)}."
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
    if not faults and (choices := Space(axes).choices) is not None:
        if (size := math.prod(map(len, choices))) == 1:
            faults.append("nothing in it varies")
        elif size < trials:
            faults.append(f"it has {size:,} different trials, and {trials:,} are asked for")
    if faults:
        raise ValueError(f"The space is contradictory: {'; '.join(faults)}.")
    return Space(axes)


def _axis(name: str, given: Any, usual: Recipe) -> Any:
    """One name's values, each checked in a recipe."""
    is_range = isinstance(given, Mapping)
    values: list[Any] = given if isinstance(given, list) else [given]
    if is_range:
        if {*given} != {"low", "high"} or name == "targets":
            raise ValueError(f"{name} must have low and high and nothing else, got {given!r:.80}")
        values = [given["low"], given["high"]]
        if not 0 < values[0] < values[1]:
            raise ValueError(f"{name} needs 0 < low < high, got {values[0]} and {values[1]}")
    elif name == "targets":
        values = [json.dumps(c if isinstance(c, list) else [c]) for c in values]
    for value in values:
        usual.varied({name: value})
    if is_range:
        return Range(*values)
    distinct = {frozenset(json.loads(v)) if name == "targets" else v for v in values}
    if len(distinct) < len(values):
        raise ValueError(f"{name} has a choice twice: {given!r:.80}")
    if not values:
        raise ValueError(f"{name} has no choice")
    return tuple(values)
