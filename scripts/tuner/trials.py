"""A trial of a search: its recipe, and what is known of a training of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

import gpt2
import lora

DEFAULT = "default"  # the configuration that is trained too and takes no part
Values = Mapping[str, float | int | str]
"""What a trial has of the space by name; several targets stand in one text, as JSON."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An adapter, how it is trained, and the learning rate of B over that of A (LoRA+)."""

    adapter: lora.LoRAConfig
    training: gpt2.TrainConfig
    b_ratio: float

    def seeded(self, seed: int) -> Recipe:
        """The same with another seed: of the first A, the order of the data, and dropout."""
        adapter, training = (replace(part, seed=seed) for part in (self.adapter, self.training))
        return replace(self, adapter=adapter, training=training)

    def varied(self, values: Values) -> Recipe:
        """The same with what a trial has of a space; where r varies, alpha / r stays.

        Raises:
            ValueError, TypeError: a value that there cannot be.
        """
        left: dict[str, Any] = dict(values)
        own = {name: left.pop(name) for name in ("dropout", "targets") if name in left}
        if "targets" in own:
            own["targets"] = tuple(names_of(own["targets"]))
        if {"r", "alpha_over_r"} & {*left}:
            ratio = left.pop("alpha_over_r", self.adapter.alpha / self.adapter.r)
            own["r"] = left.pop("r", self.adapter.r)
            own["alpha"] = ratio * own["r"]
        b_ratio = left.pop("b_ratio", self.b_ratio)
        if not (b_ratio > 0 and math.isfinite(b_ratio)):
            raise ValueError(f"b_ratio must be finite and above 0, got {b_ratio}.")
        for name, other in (("steps", "epochs"), ("epochs", "steps")):
            if name in values:
                left[other] = None
        adapter, training = replace(self.adapter, **own), replace(self.training, **left)
        return Recipe(adapter=adapter, training=training, b_ratio=b_ratio)

    def values(self, names: Sequence[str]) -> dict[str, Any]:
        """What it has of a space, by name."""
        adapter, targets = self.adapter, self.adapter.targets
        own = {
            "b_ratio": self.b_ratio,
            "alpha_over_r": adapter.alpha / adapter.r,
            "targets": [targets] if isinstance(targets, str) else list(targets),
        }
        known = {**vars(self.training), **vars(adapter), **own}
        return {name: known[name] for name in names}


def names_of(text: str) -> list[str]:
    """The targets that a value stands for."""
    return json.loads(text) if text.startswith("[") else [text]


@dataclass(kw_only=True)
class Run:
    """A trial's training under a seed.

    Its losses are on the validation data, by step; before the last step, of a copy that cooled
    down. Its position, if it goes on, is parameters and AdamW's moments; at its end without those.
    """

    trial: int | str  # its number, or `DEFAULT`
    recipe: Recipe
    total: int  # steps of its whole schedule
    curve: list[float] = field(default_factory=list[float])  # the training loss of each step
    losses: dict[int, float] = field(default_factory=dict[int, float])
    ended: str | None = None  # why it ended early, if it did
    position: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def seed(self) -> int:
        """Of its order of data, dropout and first A."""
        return self.recipe.training.seed

    @property
    def taken(self) -> int:
        """Steps that it has taken, the one included that failed."""
        return len(self.curve)

    @property
    def loss(self) -> float:
        """The last on the validation data; NaN where it ended."""
        return math.nan if self.ended or not self.losses else self.losses[max(self.losses)]
