"""What an adapter is made of (`LoRAConfig`), and what one layer's update is (`UpdateConfig`)."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar

import torch

Names = str | Sequence[str]
Slices = Sequence[str] | Mapping[str, int]
"""Names of the equal parts of a layer's output, or its parts' sizes by name."""
T = TypeVar("T")

# What PEFT's LoraConfig calls the fields, and what they are here.
PEFT_NAMES = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "layers_to_transform": "layers",
    "use_rslora": "rslora",
    "rank": "r",
}
_ADVICE = {
    "fan_in_fan_out": "not needed: the layer's class tells the layout",
    "task_type": "not needed: the model is called as it is",
    "use_dora": "not supported: there is no DoRA",
    "init_lora_weights": "not supported: an adapter is drawn as PEFT does with True",
    "trainable_token_indices": "not supported: target the embedding, or name it in modules_to_save",
    "bias": "not supported: name the modules whose biases should train in modules_to_save",
}


def explained(cls: type[T]) -> type[T]:
    """A dataclass whose TypeError for an unknown argument says what to write instead."""
    create: Any = cls.__init__
    known = [f.name for f in fields(cls)]  # pyright: ignore[reportArgumentType]

    @wraps(create)
    def checked(self: T, **arguments: Any) -> None:
        for name in arguments:
            if name in PEFT_NAMES:
                raise TypeError(f"{name!r} is PEFT's name: here it is {PEFT_NAMES[name]}.")
            if name in _ADVICE:
                raise TypeError(f"{name!r} is {_ADVICE[name]}.")
            if name not in known:
                near = get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
                raise TypeError(f"There is no argument {name!r}; {hint}")
        create(self, **arguments)

    cls.__init__ = checked
    return cls


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """What one update is made of; it describes the update's `factors()`.

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
        _settle(self)

    @property
    def scaling(self) -> float:
        """The factor `s` of the formula."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def stacked(self, k: int) -> UpdateConfig:
        """The config of k such updates side by side: rank k·r, the same scaling."""
        grown = self.alpha * (math.sqrt(k) if self.rslora else k)
        return replace(self, r=self.r * k, alpha=grown)


@explained
@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """What an adapter is made of: the sizes of its updates, and the layers that get one.

    Args:
        r: rank of every update; at most the smaller side of its layer.
        alpha: scaling numerator; an update counts `alpha / r` times.
        dropout: probability in [0, 1) on the input of the updates in training (embeddings, whose
            input is a token id, have none).
        targets: dotted suffixes of module paths, matched on whole segments; `"c_attn[q,v]"` for
            slices of an output; `"all-linear"` for every linear layer but the output head, with a
            warning for those that cannot be adapted; a regular expression, told by one of
            `*+?()|^$\\`, for the whole path.
        exclude: suffixes or regular expressions of target layers to leave out.
        layers: numbers of the blocks to adapt, the first number in a path; None for all.
        rank_pattern: other ranks for targets, by suffix or regular expression.
        alpha_pattern: other alphas for targets, likewise.
        slices: names of the equal parts of the targets' outputs, in order, or a mapping with each
            part's size; by default the layer's own attribute `slices`.
        rslora: scale by `alpha / √r` instead of `alpha / r`.
        modules_to_save: suffixes of modules, such as a classifier's head, of which the adapter
            trains a copy as a whole.
        seed: makes the adapter the same in each run; None draws one from torch's
            global generator.
        dtype: of A and B; by default the base layer's, but float32 beside a 16-bit base.

    Raises:
        TypeError: an argument that is none of these; of PEFT's it says what to write instead.
        ValueError: naming each argument that is out of range.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: Names = ("c_attn",)
    exclude: Names = ()
    layers: int | Iterable[int] | None = None
    rank_pattern: Mapping[str, int] | None = field(default=None, hash=False)
    alpha_pattern: Mapping[str, float] | None = field(default=None, hash=False)
    slices: Slices | None = field(default=None, hash=False)
    rslora: bool = False
    modules_to_save: Names = ()
    seed: int | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        _settle(self)
        if not self.targets and not self.modules_to_save:
            raise ValueError("targets must name at least one layer.")


def as_names(names: Names) -> tuple[str, ...]:
    """One name or several as a tuple."""
    several = (names,) if isinstance(names, str) else tuple(names)
    if not all(isinstance(name, str) and name for name in several):
        raise TypeError("a name must be text")
    return several


def as_number(value: Any) -> float:
    """A number of Python or NumPy as Python's; an integer stays one."""
    return operator.index(value) if hasattr(value, "__index__") else float(value)


def as_numbers(numbers: int | Iterable[int]) -> tuple[int, ...]:
    """One number or several as a tuple."""
    return tuple(map(operator.index, numbers if isinstance(numbers, Iterable) else (numbers,)))


_INTEGER, _NUMBER = ("an integer", operator.index), ("a number", as_number)
_NAMES = ("a name or several", as_names)
_MEANINGS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "r": _INTEGER,
    "alpha": _NUMBER,
    "dropout": _NUMBER,
    "rslora": ("true or false", bool),
    "targets": _NAMES,
    "exclude": _NAMES,
    "modules_to_save": _NAMES,
    "layers": ("block numbers", as_numbers),
    "rank_pattern": ("ranks by suffix", lambda p: {k: operator.index(v) for k, v in p.items()}),
    "alpha_pattern": ("numbers by suffix", lambda p: {k: as_number(v) for k, v in p.items()}),
    "slices": ("names or sizes", lambda s: dict(s) if isinstance(s, Mapping) else as_names(s)),
    "seed": _INTEGER,
}


def _settle(config: UpdateConfig | LoRAConfig) -> None:
    """Convert each field to the type that it means, and check the sizes."""
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name not in _MEANINGS or (value is None and f.default is None):
            continue
        wanted, convert = _MEANINGS[f.name]
        try:
            object.__setattr__(config, f.name, convert(value))
        except (TypeError, ValueError, AttributeError):
            raise ValueError(f"{f.name} must be {wanted}, got {value!r:.120}.") from None
    faults: list[str] = []
    if config.r < 1:
        faults.append(f"r must be at least 1, got {config.r}")
    if not 0 < config.alpha < math.inf:
        faults.append(f"alpha must be finite and above 0, got {config.alpha}")
    if not 0 <= config.dropout < 1:
        faults.append(f"dropout must be in [0, 1), got {config.dropout}")
    if faults:
        raise ValueError("; ".join(faults) + ".")
