"""What an adapter is made of (`LoRAConfig`), and what one layer's update is (`UpdateConfig`)."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard, cast

import torch

from lora.foreign import answering
from lora.messages import brief

Names = str | Sequence[str]
Slices = Sequence[str] | Mapping[str, int]
"""Names of the equal parts of a layer's output, or its parts' sizes by name."""

BIASES = ("none", "lora_only", "all")


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
        if faults := update_faults(self):
            raise ValueError("; ".join(faults) + ".")

    @property
    def scaling(self) -> float:
        """The factor `s` of the formula."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def stacked(self, k: int) -> UpdateConfig:
        """The config of k such updates side by side: rank k·r, the same scaling."""
        grown = self.alpha * (math.sqrt(k) if self.rslora else k)
        return replace(self, r=self.r * k, alpha=grown)


@answering
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
        slices: names of the equal parts of a fused projection, or a mapping from each part's name
            to its outputs, for layers that do not name theirs.
        rslora: scale by `alpha / √r`.
        modules_to_save: suffixes of modules, such as a classifier head, of which the adapter trains
            and saves a whole copy.
        bias: which biases the adapter trains copies of: "none", "lora_only" (those of the adapted
            layers) or "all".
        seed: fixes the adapter, in whatever order layers are found; None draws one from torch's
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
    layers: Iterable[int] | None = None
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    slices: Slices | None = None
    rslora: bool = False
    modules_to_save: Names = ()
    bias: str = "none"
    seed: int | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in ("targets", "exclude", "modules_to_save", "layers"):
            object.__setattr__(self, name, _settled(getattr(self, name)))
        faults = update_faults(self)
        for name in ("targets", "exclude", "modules_to_save"):
            if not _are_names(getattr(self, name)):
                faults.append(f"{name} must be a name or several, got {brief(getattr(self, name))}")
        if not _names_something(self.targets) and not _names_something(self.modules_to_save):
            faults.append(f"targets must name at least one layer, got {brief(self.targets)}")
        if self.layers is not None and not _are_numbers(self.layers):
            faults.append(f"layers must be several block numbers, got {brief(self.layers)}")
        for name in ("rank_pattern", "alpha_pattern"):
            if not _is_pattern(getattr(self, name)):
                value = brief(getattr(self, name))
                faults.append(f"{name} must map suffixes to numbers above 0, got {value}")
        if self.bias not in BIASES:
            faults.append(f"bias must be one of {', '.join(BIASES)}, got {brief(self.bias)}")
        if self.seed is not None and (type(self.seed) is not int or abs(self.seed) >= 2**63):
            faults.append(f"seed must be a 64-bit integer or None, got {brief(self.seed)}")
        if not is_float(self.dtype):
            faults.append(f"dtype must be a floating-point torch.dtype, got {brief(self.dtype)}")
        if faults:
            raise ValueError("; ".join(faults) + ".")


def update_faults(config: UpdateConfig | LoRAConfig) -> list[str]:
    """What is out of range of the fields that both configs have."""
    faults: list[str] = []
    if type(config.r) is not int or config.r < 1:
        faults.append(f"r must be an integer of at least 1, got {brief(config.r)}")
    if not is_finite(config.alpha) or config.alpha <= 0:
        faults.append(f"alpha must be a finite number above 0, got {brief(config.alpha)}")
    if not is_finite(config.dropout) or not 0 <= config.dropout < 1:
        faults.append(f"dropout must be in [0, 1), got {brief(config.dropout)}")
    if type(config.rslora) is not bool:
        faults.append(f"rslora must be True or False, got {brief(config.rslora)}")
    return faults


def is_finite(value: object) -> TypeGuard[float]:
    """Whether this is a number that a float can hold: no bool, NaN, infinity or huge integer."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def is_float(dtype: object) -> bool:
    """Whether this is None or a dtype in which factors can be computed with."""
    if dtype is None:
        return True
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 2


def as_names(names: Names) -> tuple[str, ...]:
    """One name or several as a tuple."""
    return (names,) if isinstance(names, str) else tuple(names)


def _settled(value: Any) -> Any:
    """Several values as a tuple, since an iterator is empty after its first use."""
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        return cast(Any, value)
    try:
        return tuple(cast(Iterable[Any], value))
    except TypeError:  # a tensor without axes says that it is iterable
        return cast(Any, value)


def _are_names(value: object) -> bool:
    if isinstance(value, str):
        return True
    names = cast(tuple[object, ...], value) if isinstance(value, tuple) else (None,)
    return all(isinstance(name, str) and name for name in names)


def _names_something(value: object) -> bool:
    return bool(value) and value != ("",)


def _are_numbers(value: object) -> bool:
    numbers = cast(tuple[object, ...], value) if isinstance(value, tuple) else (None,)
    return all(type(number) is int for number in numbers)


def _is_pattern(value: object) -> bool:
    if value is None:
        return True
    if not isinstance(value, Mapping):
        return False
    pairs = cast(Mapping[object, object], value).items()
    return all(isinstance(k, str) and k and is_finite(v) and v > 0 for k, v in pairs)
