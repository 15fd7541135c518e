"""LoRA for any PyTorch module: inject, train, merge, save. `help(lora.inject)` shows one verb.

On a model and off it:
    inject                a new adapter beside the target layers; all else is frozen
    LoRAConfig            what an adapter is made of: rank, alpha, targets
    eject                 every adapter off the model, or folded into it for good
    Population            many adapters trained in one batch

What is trained:
    count_parameters      trainable and all: a ParameterCount
    ParameterCount        prints as PEFT's count does
    trainable_parameters  those that an optimiser should be given
    parameter_groups      groups in which B learns faster (LoRA+)

Several adapters:
    adapters              what each is made of, by name
    active                those in force, with their weights
    activate              put one in force, or a weighted sum of several
    activated             the same, within a context
    disabled              the base alone, within a context
    routed                rows of one batch under different adapters, within a context
    remove                one adapter off the model
    algebra               adapters as values: sums, lower ranks

Merging, exactly:
    merge                 the active updates into the weights
    unmerge               the very bytes of the base again
    merged                merged within a context
    is_merged             whether it is

Files:
    save                  a folder in PEFT's format
    load                  an adapter from such a folder, or from the Hub
    base_state_dict       the state dict of the base alone

One layer, where reading starts (`lora.layer`):
    LoRALinear            an adapted linear layer, or embedding: the formula
    LowRankUpdate         one adapter's A, B and dropout in it
    UpdateConfig          what that is made of
"""

import typing

from lora import algebra as algebra
from lora.bank import activate as activate
from lora.bank import activated as activated
from lora.bank import active as active
from lora.bank import adapters as adapters
from lora.bank import disabled as disabled
from lora.bank import remove as remove
from lora.config import LoRAConfig as LoRAConfig
from lora.config import UpdateConfig as UpdateConfig
from lora.disk.checkpoint import load as load
from lora.disk.checkpoint import save as save
from lora.injection import eject as eject
from lora.injection import inject as inject
from lora.layer import LoRALinear as LoRALinear
from lora.layer import LowRankUpdate as LowRankUpdate
from lora.merging import is_merged as is_merged
from lora.merging import merge as merge
from lora.merging import merged as merged
from lora.merging import unmerge as unmerge
from lora.parameters import ParameterCount as ParameterCount
from lora.parameters import base_state_dict as base_state_dict
from lora.parameters import count_parameters as count_parameters
from lora.parameters import parameter_groups as parameter_groups
from lora.parameters import trainable_parameters as trainable_parameters
from lora.population import Population as Population
from lora.routing import routed as routed

if typing.TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import metadata  # not at the top: few ask

        try:
            return metadata.version("lora-gpt2")
        except metadata.PackageNotFoundError:
            raise AttributeError("lora-gpt2 is not installed, and has no version.") from None
