"""The fields of `LoRAConfig` as the keywords of `lora.inject`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypedDict, cast

import torch

from lora.config import LoRAConfig, Names, Slices
from lora.messages import brief


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
    own = LoRAConfig(**settings)  # raises what is strange in them
    if config is None:
        return own
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
