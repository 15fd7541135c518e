"""LoRA for any PyTorch module: inject, train, merge, save. Start reading at `lora.layer`."""

from lora.adapters import activate, activated, active, adapters, disabled, remove
from lora.algebra import (
    Factors,
    add,
    combine,
    deltas,
    factors,
    implant,
    read,
    scale,
    subtract,
)
from lora.checkpoint import load, save
from lora.config import UpdateConfig
from lora.inject import eject, inject
from lora.layer import LoRALinear, LowRankUpdate
from lora.loralib import load_loralib
from lora.lowrank import Approximation, approximate, compress, dare, extract, ties
from lora.merge import Agreement, MergeReport, Rounding, is_merged, merge, merged, unmerge
from lora.parameters import (
    ParameterCount,
    base_state_dict,
    count_parameters,
    parameter_groups,
    trainable_parameters,
)
from lora.routing import routed

__all__ = [
    "Agreement",
    "Approximation",
    "Factors",
    "LoRALinear",
    "LowRankUpdate",
    "MergeReport",
    "ParameterCount",
    "Rounding",
    "UpdateConfig",
    "activate",
    "activated",
    "active",
    "adapters",
    "add",
    "approximate",
    "base_state_dict",
    "combine",
    "compress",
    "count_parameters",
    "dare",
    "deltas",
    "disabled",
    "eject",
    "extract",
    "factors",
    "implant",
    "inject",
    "is_merged",
    "load",
    "load_loralib",
    "merge",
    "merged",
    "parameter_groups",
    "read",
    "remove",
    "routed",
    "save",
    "scale",
    "subtract",
    "ties",
    "trainable_parameters",
    "unmerge",
]
