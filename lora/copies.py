"""What an adapter trains whole beside its low-rank updates: a classifier's head, say, or biases.

Source: PEFT's `modules_to_save` and `bias`, whose files hold the same.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from lora.adapted import Adapted


class ModuleCopy(Adapted):
    """A frozen module, and beside it the copies of it that adapters train; one is in force.

    Args:
        base: any module. `updates` holds the copies.
    """

    @property
    def in_force(self) -> nn.Module:
        """The active adapter's copy, or the base where it has none."""
        copies = [self.updates[name] for name in self.active]
        return copies[0] if copies and self.enabled else self.base

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """As the module in force."""
        return self.in_force(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        """What is asked of the module, such as its weight, is asked of the one in force."""
        if name in ("base", "updates") or name not in dir(vars(self)["_modules"]["base"]):
            return super().__getattr__(name)
        return getattr(self.in_force, name)


def whole_copy(base: nn.Module) -> nn.Module:
    """A copy that trains wherever it holds floats."""
    double = copy.deepcopy(base)
    for parameter in double.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return double


def bias_copy(base: nn.Module) -> nn.Module:
    """The same module over the same parameters, but with a bias of its own, which trains."""
    double = type(base).__new__(type(base))
    vars(double).update(vars(base))
    vars(double)["_parameters"] = {**vars(base)["_parameters"], "bias": own_bias(base)}
    return double


def own_bias(base: nn.Module) -> nn.Parameter | None:
    """A trainable copy of a module's bias, if it has one."""
    bias = dict(base.named_parameters(recurse=False)).get("bias")
    return None if bias is None else nn.Parameter(bias.detach().clone())


def own_tensors(base: nn.Module, update: nn.Module) -> dict[str, Tensor]:
    """The tensors of a copy that are not the base's very own, by name."""
    theirs = {id(tensor) for tensor in (*base.parameters(), *base.buffers())}
    state: dict[str, Tensor] = {**dict(update.named_parameters()), **dict(update.named_buffers())}
    return {name: tensor for name, tensor in state.items() if id(tensor) not in theirs}
