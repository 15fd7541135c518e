"""Arguments that are not ours: each is told what to write instead, or that it is not here.

Source of the names: PEFT's `LoraConfig`, versions 0.17 to 0.21.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar

from lora.messages import brief, listed

# What PEFT calls the arguments of its LoraConfig, and what they are here.
PEFT_NAMES = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "layers_to_transform": "layers",
    "use_rslora": "rslora",
    "adapter_name": "adapter, of lora.inject",
}
NEEDLESS = {
    "fan_in_fan_out": "the layer's class tells the layout",
    "task_type": "the model is called as it is",
    "peft_type": "this is LoRA",
    "auto_mapping": "the model keeps its class",
    "peft_version": "it is a note of PEFT's about itself",
    "base_model_name_or_path": "the base is the model that is given",
    "revision": "the base is the model that is given",
    "inference_mode": "model.eval() turns dropout off, torch.no_grad() the gradients",
    "runtime_config": "nothing is moved from device to device",
}
MISSING = {
    "use_dora": "there is no DoRA",
    "use_qalora": "there is no QALoRA",
    "qalora_group_size": "there is no QALoRA",
    "use_bdlora": "there is no BD-LoRA",
    "kasa_config": "there is no KaSA",
    "velora_config": "there is no VeLoRA",
    "monteclora_config": "there is no MonteCLoRA",
    "alora_invocation_tokens": "there is no aLoRA; an adapter is in force from the first token on",
    "arrow_config": "there is no Arrow; lora.routed is told which adapter a row is under",
    "init_lora_weights": "an adapter is always drawn as PEFT does with True",
    "eva_config": "A is drawn without a look at the data",
    "corda_config": "A is drawn without a look at the data",
    "lora_ga_config": "A is drawn without a look at the data",
    "loftq_config": "the base is not quantised",
    "megatron_config": "Megatron's parallel layers are not adapted",
    "megatron_core": "Megatron's parallel layers are not adapted",
    "layers_pattern": "layers counts the first number in a path, and a regular expression in "
    "targets can name other blocks",
    "layer_replication": "the model's layers are left as they are; repeat them before lora.inject",
    "lora_bias": "B has no bias; bias='lora_only' trains those of the adapted layers",
    "target_parameters": "targets are modules, and a parameter alone is none",
    "trainable_token_indices": "an embedding is a target, or a module to save, as a whole",
    "ensure_weight_tying": "a shared weight is refused, or untied by lora.inject(…, untie=True)",
}
SYNONYMS = {"rank": "r"}

T = TypeVar("T")


def answering(kind: type[T]) -> type[T]:
    """A dataclass whose arguments, where they are strange, are told those that there are."""
    made: Any = kind.__init__
    known = [field.name for field in fields(kind)]  # pyright: ignore[reportArgumentType]

    @wraps(made)
    def checked(self: T, *values: Any, **named: Any) -> None:
        if strange := [name for name in named if name not in known]:
            said = listed(_answer(name, known) for name in strange)
            raise TypeError(said if said.endswith("?") else f"{said}.")
        made(self, *values, **named)

    kind.__init__ = checked
    return kind


def _answer(name: str, known: Sequence[str]) -> str:
    if name in PEFT_NAMES:
        return f"{name!r} is PEFT's name: here it is {PEFT_NAMES[name]}"
    if name in NEEDLESS:
        return f"{name!r} is not needed: {NEEDLESS[name]}"
    if name in MISSING:
        return f"{name!r} is PEFT's, and not here: {MISSING[name]}"
    near = [SYNONYMS[name]] if name in SYNONYMS else get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
    return f"there is no argument {brief(name)}; {hint}"
