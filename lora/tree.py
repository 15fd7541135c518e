"""One survey of a model: what it is made of, which layers are adapted, what shares a weight.

A verb surveys the model once and hands the `Tree` on; nothing asks the model again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from torch import Tensor, nn

from lora.copies import ModuleCopy
from lora.layer import Adapted, LoRALinear


@dataclass(frozen=True)
class Tree:
    """A model as one walk sees it.

    Args:
        model: what was surveyed.
        root: the model without the wrappers around it.
        bases: every module as if the model had never been injected, by its first path.
        adapted: the adapted modules by their first path.
        uses: by a module's first path, each of its paths with the parent and its name there.
    """

    model: nn.Module
    root: nn.Module
    bases: dict[str, nn.Module]
    adapted: dict[str, Adapted]
    uses: dict[str, list[tuple[str, nn.Module, str]]]

    @cached_property
    def layers(self) -> dict[str, LoRALinear]:
        """The adapted linear layers by their first path."""
        return {path: a for path, a in self.adapted.items() if isinstance(a, LoRALinear)}

    @cached_property
    def copies(self) -> dict[str, ModuleCopy]:
        """The modules of which adapters train copies, by their first path."""
        return {path: a for path, a in self.adapted.items() if isinstance(a, ModuleCopy)}

    @property
    def adapters(self) -> list[str]:
        """Every adapter's name, in the order in which modules first carry them."""
        return list(dict.fromkeys(name for a in self.adapted.values() for name in a.updates))

    def carrying(self, adapter: str) -> dict[str, Adapted]:
        """The adapted modules that carry this adapter."""
        if adapter not in self.adapters:
            raise ValueError(f"There is no adapter {adapter!r} here ({self.named()}).")
        return {path: a for path, a in self.adapted.items() if adapter in a.updates}

    def named(self) -> str:
        """The adapters that are there, for a message."""
        return f"there are: {', '.join(self.adapters)}" if self.adapters else "there is none"

    def paths(self, first: Collection[str]) -> list[str]:
        """Every path of the modules at these first paths, in the order of the model."""
        return [path for key in self.uses if key in first for path, _, _ in self.uses[key]]

    def replace(self, new: Mapping[str, nn.Module]) -> None:
        """Put each module wherever the one of that first path stands."""
        for path, module in new.items():
            for _, parent, name in self.uses[path]:
                parent.register_module(name, module)

    def require_settled(self) -> None:
        """Raise where a change would leave a merged weight, a routing or a shard stale."""
        if self.is_sharded:
            raise RuntimeError(
                "The model is sharded, and can only be run, trained and saved: inject, load, merge "
                "and eject before fully_shard."
            )
        self.require_unmerged()
        if any(layer.routing is not None for layer in self.layers.values()):
            raise RuntimeError("The model is routed. Leave the lora.routed context first.")

    def require_unmerged(self) -> None:
        """Raise where a merged weight would go stale."""
        if self.is_merged:
            raise RuntimeError(
                "The model is merged. Call lora.unmerge first (or eject with merge=True)."
            )

    def refuse_ddp(self) -> None:
        """Raise where DDP, which has looked up what is trained, would leave processes apart."""
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            raise RuntimeError("The model is wrapped in DDP. Inject and activate before wrapping.")

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the parameters."""
        return any(hasattr(parameter, "full_tensor") for parameter in self.root.parameters())

    @property
    def is_merged(self) -> bool:
        """Whether a weight is folded."""
        return any(layer.merged is not None for layer in self.layers.values())

    def shared_weights(self, paths: Iterable[str]) -> list[str]:
        """Of each module at `paths` that shares a weight with another, the tensor's names."""
        names: dict[int, list[str]] = defaultdict(list)
        for path, module in self.bases.items():
            for name, parameter in module.named_parameters(recurse=False):
                names[_address(parameter)].append(f"{path}.{name}".removeprefix("."))
        shared: list[str] = []
        for path in paths:
            for parameter in self.bases[path].parameters():
                uses = names[_address(parameter)]
                if not all(name.startswith(f"{path}.") for name in uses):
                    shared.append(" and ".join(uses))
        return list(dict.fromkeys(shared))


def survey(model: nn.Module) -> Tree:
    """Walk a model once; the walk stops at an adapted module, whatever hangs below it."""
    tree = Tree(model, unwrap(model), {}, {}, {})
    first: dict[nn.Module, str] = {}

    def visit(module: nn.Module, path: str, parent: nn.Module | None, name: str) -> None:
        if "_orig_mod" in module._modules:  # compiled in its place: what it wraps keeps the path
            module, parent, name = module.get_submodule("_orig_mod"), module, "_orig_mod"
        if getattr(type(module), "is_stacked", False):
            raise RuntimeError(
                "The model runs under a population. Call its eject(), or work within its adapter()."
            )
        if type(module).__name__ == "FullyShardedDataParallel":
            raise RuntimeError(
                "FSDP1 flattens weights. Use torch's fully_shard, after lora.inject."
            )
        if module not in first:
            first[module], tree.uses[path] = path, []
            tree.bases[path] = module.base if isinstance(module, Adapted) else module
            if isinstance(module, Adapted):
                tree.adapted[path] = module
        if parent is not None:
            tree.uses[first[module]].append((path, parent, name))
        if not isinstance(module, Adapted):
            for key, child in module._modules.items():
                if child is not None:
                    visit(child, f"{path}.{key}".removeprefix("."), module, key)

    visit(tree.root, "", None, "")
    return tree


def survey_adapted(model: nn.Module) -> Tree:
    """As `survey`, but a model without any adapter is a RuntimeError."""
    tree = survey(model)
    if not tree.adapted:
        raise RuntimeError("The model carries no adapter. Call lora.inject or lora.load first.")
    return tree


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside the wrapper of torch.compile, DDP, AveragedModel or Lightning."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"The model must be a torch.nn.Module, got {type(model).__name__}.")
    while True:
        classes = {cls.__name__ for cls in type(model).__mro__}
        inner: Sequence[Any] = ()
        if classes & {"DataParallel", "DistributedDataParallel", "AveragedModel"}:
            inner = (model.module,)
        elif "OptimizedModule" in classes:
            inner = (model._orig_mod,)
        elif "LightningModule" in classes:
            inner = [child for child in model.children() if any(True for _ in child.parameters())]
        if len(inner) != 1:
            return model
        model = cast(nn.Module, inner[0])


def listed(faults: Sequence[str], most: int = 12) -> str:
    """The first faults, and how many more there are."""
    more = [f"and {len(faults) - most} more"] if len(faults) > most else []
    return "; ".join([*faults[:most], *more])


def _address(tensor: Tensor) -> int:
    """What two parameters over the same memory have in common."""
    try:
        return tensor.data_ptr() or id(tensor)
    except RuntimeError:  # of a tensor subclass without memory of its own, such as a quantised one
        return id(tensor)
