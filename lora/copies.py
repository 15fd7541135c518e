"""Modules that an adapter trains whole beside its low-rank updates, such as a classifier's head.

Source: PEFT's `modules_to_save`, whose files hold the same.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from lora.layer import Adapted


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
        if name in ("base", "updates") or name not in dir(vars(self)["base"]):
            return super().__getattr__(name)
        return getattr(self.in_force, name)


def whole_copy(base: nn.Module) -> nn.Module:
    """A copy that trains wherever it holds floats."""
    double = copy.deepcopy(base)
    for parameter in double.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return double
