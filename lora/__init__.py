"""LoRA for any PyTorch module: inject, train, merge, save. Start reading at `lora.layer`."""

from lora.adapters import disabled
from lora.checkpoint import load, save
from lora.inject import (
    ParameterCount,
    base_state_dict,
    count_parameters,
    eject,
    inject,
    trainable_parameters,
)
from lora.layer import LoRALinear, LowRankUpdate, UpdateConfig
from lora.merge import is_merged, merge, merged, unmerge

__all__ = [
    "LoRALinear",
    "LowRankUpdate",
    "ParameterCount",
    "UpdateConfig",
    "base_state_dict",
    "count_parameters",
    "disabled",
    "eject",
    "inject",
    "is_merged",
    "load",
    "merge",
    "merged",
    "save",
    "trainable_parameters",
    "unmerge",
]
