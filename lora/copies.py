"""Modules that an adapter trains whole, such as a classifier's head: PEFT's `modules_to_save`."""

import copy
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from lora.layer import Adapted
from lora.targets import fits
from lora.tree import Tree


class ModuleCopy(Adapted):
    """A frozen module, and in `updates` the copies of it that adapters train."""

    @property
    def in_force(self) -> nn.Module:
        """The active adapter's copy, or the base where it has none."""
        copies = [self.updates[name] for name in self.active]
        return copies[0] if copies and self.enabled else self.base

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """As the module in force."""
        return self.in_force(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        if name in ("base", "updates") or name not in dir(vars(self)["base"]):
            return super().__getattr__(name)
        return getattr(self.in_force, name)


def whole_copy(base: nn.Module) -> nn.Module:
    """A copy that trains wherever it holds floats."""
    double = copy.deepcopy(base)
    for parameter in double.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return double


def copies_of(tree: Tree, names: Sequence[str], adapted: Collection[str]) -> dict[str, nn.Module]:
    """A copy of each module that is named, by path; `adapted` are the paths of targets."""
    whole: list[str] = []
    for name in names:
        paths = [path for path in tree.bases if path and fits(path, name)]
        if not paths:
            raise ValueError(f"No module matches modules_to_save {name!r}.")
        whole += paths
    for path in whole:
        if type(tree.bases[path]).forward is nn.Module.forward:
            raise ValueError(f"{path} in modules_to_save has no forward: name what it holds.")
    inside = tuple(f"{path}." for path in (*whole, *tree.copies))
    if clash := [p for p in adapted if p in whole or p.startswith(inside)]:
        raise ValueError(f"{clash[0]} is a target and in modules_to_save. Leave it out (exclude=).")
    return {path: whole_copy(tree.bases[path]) for path in whole if not path.startswith(inside)}
