"""What an adapter is made of, and what one layer's update is."""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, Self

import torch

Names = str | Sequence[str]
Slices = Sequence[str] | Mapping[str, int]  # equal parts of an output, or sizes by name

PEFT_NAMES = {  # of fields, and what they are here
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "layers_to_transform": "layers",
    "use_rslora": "rslora",
    "rank": "r",
}


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """What one update is made of.

    Args:
        r: rank, at least 1.
        alpha: numerator of the scaling, above 0.
        dropout: probability in [0, 1) of dropping an input feature of the update in training.
        rslora: scale by `alpha / √r` instead of `alpha / r` (Kalajdzievski 2023).

    Raises:
        ValueError: naming each argument that is out of range.
    """

    r: int
    alpha: float
    dropout: float
    rslora: bool = False
    scaling: float = field(init=False, repr=False)  # the factor `s` of the formula

    def __post_init__(self) -> None:
        _settle(self)
        s = self.alpha / (math.sqrt(self.r) if self.rslora else self.r)
        object.__setattr__(self, "scaling", s)

    def stacked(self, k: int) -> Self:
        """The config of k such updates side by side: rank k·r."""
        grown = self.alpha * (math.sqrt(k) if self.rslora else k)
        return replace(self, r=self.r * k, alpha=grown)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """What an adapter is made of: sizes of updates, and the layers that get one.

    Args:
        r: rank of every update; at most the smaller side of its layer.
        alpha: scaling numerator; an update counts `alpha / r` times.
        dropout: probability in [0, 1) on the input of the updates in training (not of ids).
        targets: suffixes of paths, on whole segments; `"c_attn[q,v]"` for slices of an output;
            `"all-linear"` for every linear layer but the output head; or a regular expression,
            which has one of `*+?()|^$\\`, for the whole path.
        exclude: suffixes or regular expressions of target layers to leave out.
        layers: numbers of the blocks to adapt, the first number in a path; None for all.
        rank_pattern: other ranks for targets, by suffix or regular expression.
        alpha_pattern: other alphas for targets, likewise.
        slices: names of the equal parts of an output, in order, or their sizes by name; by default
            the layer's attribute `slices`.
        rslora: scale by `alpha / √r` instead of `alpha / r`.
        modules_to_save: suffixes of modules, such as a head, of which a whole copy is trained.
        seed: makes the adapter the same in each run; None draws one from torch's generator.
        dtype: of A and B; by default the base layer's, but float32 beside a 16-bit base.

    Raises:
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


def config_of(
    config: LoRAConfig | None, settings: Mapping[str, Any], default: LoRAConfig | None = None
) -> LoRAConfig:
    """A config as it is, or keywords that replace fields of a default."""
    known = LoRAConfig.__dataclass_fields__
    for name in settings.keys() - known:
        near = [PEFT_NAMES[name]] if name in PEFT_NAMES else get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
        raise TypeError(f"There is no argument {name!r}; {hint}")
    if config is None:
        defaults = {} if default is None else {**vars(default), "seed": None}
        return LoRAConfig(**{**defaults, **settings})
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"config must be a lora.LoRAConfig, got {type(config).__name__}.")
    if settings:
        raise TypeError(f"Give a config or {', '.join(settings)}, not both.")
    return config


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


_CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "r": operator.index,
    "alpha": as_number,
    "dropout": as_number,
    "rslora": bool,
    "targets": as_names,
    "exclude": as_names,
    "modules_to_save": as_names,
    "layers": as_numbers,
    "rank_pattern": lambda p: {key: operator.index(r) for key, r in p.items()},
    "alpha_pattern": lambda p: {key: as_number(alpha) for key, alpha in p.items()},
    "slices": lambda s: dict(s) if isinstance(s, Mapping) else as_names(s),
    "seed": operator.index,
}


def _settle(config: UpdateConfig | LoRAConfig) -> None:
    for f in fields(config):
        value = getattr(config, f.name, None)
        if f.name in _CONVERSIONS and not (value is None and f.default is None):
            try:
                object.__setattr__(config, f.name, _CONVERSIONS[f.name](value))
            except (TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"{f.name} cannot be {value!r:.120}: {error}.") from None
    faults: list[str] = []
    if config.r < 1:
        faults.append(f"r must be at least 1, got {config.r}")
    if not 0 < config.alpha < math.inf:
        faults.append(f"alpha must be finite and above 0, got {config.alpha}")
    if not 0 <= config.dropout < 1:
        faults.append(f"dropout must be in [0, 1), got {config.dropout}")
    if faults:
        raise ValueError("; ".join(faults) + ".")
