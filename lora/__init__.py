"""LoRA for any PyTorch module: inject, train, merge, save. Start reading at `lora.layer`."""

import typing

from lora import algebra
from lora.bank import activate, activated, active, adapters, disabled, remove
from lora.config import LoRAConfig, UpdateConfig
from lora.disk.checkpoint import load, save
from lora.disk.loralib import load_loralib
from lora.injection import eject, inject
from lora.layer import LoRALinear
from lora.merging import is_merged, merge, merged, unmerge
from lora.parameters import (
    ParameterCount,
    base_state_dict,
    count_parameters,
    parameter_groups,
    trainable_parameters,
)
from lora.population import Population
from lora.rounding import MergeReport
from lora.routing import routed
from lora.updates import LowRankUpdate

__all__ = [
    "LoRAConfig",
    "LoRALinear",
    "LowRankUpdate",
    "MergeReport",
    "ParameterCount",
    "Population",
    "UpdateConfig",
    "activate",
    "activated",
    "active",
    "adapters",
    "algebra",
    "base_state_dict",
    "count_parameters",
    "disabled",
    "eject",
    "inject",
    "is_merged",
    "load",
    "load_loralib",
    "merge",
    "merged",
    "parameter_groups",
    "remove",
    "routed",
    "save",
    "trainable_parameters",
    "unmerge",
]

if typing.TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import version  # not at the top: few ask

        return version("lora-gpt2")
