"""The fields of `LoRAConfig` as the keywords of `lora.inject`; PEFT's names are told ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import TypedDict, cast

import torch

from lora.config import LoRAConfig, Names, Slices
from lora.messages import brief

# What PEFT calls the arguments of its LoraConfig, and what they are here.
PEFT_NAMES = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "layers_to_transform": "layers",
    "use_rslora": "rslora",
    "adapter_name": "adapter",
    "rank": "r",
}
NEEDLESS = {
    "fan_in_fan_out": "the layer's class tells the layout",
    "task_type": "the model is called as it is",
    "inference_mode": "call model.eval()",
    "peft_type": "this is LoRA",
}


class LoRASettings(TypedDict, total=False):
    """The fields of `LoRAConfig` as keywords of `lora.inject`; a test holds the two together."""

    r: int
    alpha: float
    dropout: float
    targets: Names
    exclude: Names
    layers: Iterable[int] | None
    rank_pattern: Mapping[str, int] | None
    alpha_pattern: Mapping[str, float] | None
    slices: Slices | None
    rslora: bool
    modules_to_save: Names
    bias: str
    seed: int | None
    dtype: torch.dtype | None


def config_of(config: LoRAConfig | None, settings: LoRASettings) -> LoRAConfig:
    """The config given as one, or as keywords.

    Raises:
        TypeError: both are given, or a keyword that `LoRAConfig` does not have.
        ValueError: as `LoRAConfig`.
    """
    known = [field.name for field in fields(LoRAConfig)]
    if strange := [name for name in settings if name not in known]:
        raise TypeError("; ".join(_no_such_argument(name, known) for name in strange) + ".")
    if config is None:
        return LoRAConfig(**settings)
    if not isinstance(cast(object, config), LoRAConfig):
        raise TypeError(
            f"config must be a lora.LoRAConfig, got {brief(config)}. Of another library's config "
            "pass the values: lora.inject(model, r=…, alpha=…, targets=…)."
        )
    if settings:
        raise TypeError(
            f"Give a config or {', '.join(settings)}, not both; see dataclasses.replace."
        )
    return config


def _no_such_argument(name: str, known: Sequence[str]) -> str:
    if name in PEFT_NAMES:
        return f"{name!r} is PEFT's name: here it is {PEFT_NAMES[name]}"
    if name in NEEDLESS:
        return f"{name!r} is not needed: {NEEDLESS[name]}"
    near = get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
    return f"there is no argument {name!r}; {hint}"
