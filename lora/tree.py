"""One survey of a model: what it is made of, which layers are adapted, what shares a weight.

A verb surveys the model once and hands the `Tree` on; nothing asks the model again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from lora.copies import ModuleCopy
from lora.layer import Adapted, LoRALinear


class Place(NamedTuple):
    """Where a module stands: as the child `name` of `parent`, at the dotted `path`."""

    path: str
    parent: nn.Module
    name: str


@dataclass(frozen=True)
class Tree:
    """A model as one walk sees it.

    Args:
        model: what was surveyed.
        root: the model without the wrappers around it.
        bases: every module as if the model had never been injected, by its first path.
        adapted: the adapted modules by their first path.
        places: every place of each module, by the module's id.
    """

    model: nn.Module
    root: nn.Module
    bases: dict[str, nn.Module]
    adapted: dict[str, Adapted]
    places: dict[int, list[Place]]

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
        """The adapted modules that carry this adapter.

        Raises:
            ValueError: there is none.
        """
        if adapter not in self.adapters:
            raise ValueError(f"There is no adapter {adapter!r} here ({self.named()}).")
        return {path: a for path, a in self.adapted.items() if adapter in a.updates}

    def named(self) -> str:
        """The adapters that are there, for a message."""
        return f"there are: {', '.join(self.adapters)}" if self.adapters else "there is none"

    def paths(self, modules: Iterable[nn.Module]) -> list[str]:
        """Every path of these modules, in the order of the model."""
        wanted = {id(module) for module in modules}
        return [
            place.path for key, places in self.places.items() if key in wanted for place in places
        ]

    def replace(self, new: Mapping[nn.Module, nn.Module]) -> None:
        """Put each value of `new` wherever its key stands."""
        for old, module in new.items():
            for place in self.places[id(old)]:
                place.parent.register_module(place.name, module)

    def require_settled(self) -> None:
        """Raise where a change would leave a merged weight, a routing or a shard stale."""
        self.require_whole()
        self.refuse_merged()
        if any(layer.routing is not None for layer in self.layers.values()):
            raise RuntimeError("The model is routed. Leave the lora.routed context first.")

    def require_whole(self) -> None:
        """Raise where several processes hold a part of the model each."""
        if any(hasattr(parameter, "full_tensor") for parameter in self.root.parameters()):
            raise RuntimeError(
                "The model is sharded, and can only be run, trained and saved: inject, load, merge "
                "and eject before fully_shard."
            )

    def refuse_merged(self) -> None:
        """Raise where a merged weight would go stale."""
        if self.is_merged:
            raise RuntimeError("The model is merged. Call lora.unmerge first.")

    def refuse_ddp(self) -> None:
        """Raise where DDP, which has looked up what is trained, would leave processes apart."""
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            raise RuntimeError("The model is wrapped in DDP. Inject and activate before wrapping.")

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
                alike = names[_address(parameter)]
                if not all(f"{name}.".startswith(f"{path}.") for name in alike):
                    shared.append(" and ".join(alike))
        return list(dict.fromkeys(shared))


def survey(model: nn.Module) -> Tree:
    """Walk a model once; the walk stops at an adapted module, whatever hangs below it.

    Raises:
        ValueError: it is no module.
        RuntimeError: the model runs under a population, or FSDP1 has flattened its weights.
    """
    root = unwrap(model)
    modules = dict(root.named_modules(remove_duplicate=False))
    bases: dict[str, nn.Module] = {}
    adapted: dict[str, Adapted] = {}
    places: dict[int, list[Place]] = defaultdict(list[Place])
    below: set[str] = set()
    for full, module in modules.items():
        above, _, name = full.rpartition(".")
        if full and (above in below or isinstance(modules[above], Adapted)):
            below.add(full)
            continue
        if getattr(type(module), "is_stacked", False):
            raise RuntimeError(
                "The model runs under a population. Call its eject(), or work within its adapter()."
            )
        if type(module).__name__ == "FullyShardedDataParallel":
            raise RuntimeError(
                "FSDP1 flattens weights. Use torch's fully_shard, after lora.inject."
            )
        # A module that is compiled in its place keeps its path: keys are those of the plain model.
        path = full.replace("_orig_mod.", "").removesuffix("._orig_mod")
        first = id(module) not in places and module is not root
        if full:
            places[id(module)].append(Place(path, modules[above], name))
        if first or not full:
            if isinstance(module, Adapted):
                adapted[path] = module
                module = module.base
            bases[path] = module
    return Tree(model, root, bases, adapted, places)


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
        kinds = {cls.__name__ for cls in type(model).__mro__}
        inner: Sequence[Any] = ()
        if kinds & {"DataParallel", "DistributedDataParallel", "AveragedModel"}:
            inner = (model.module,)
        elif "OptimizedModule" in kinds:
            inner = (model._orig_mod,)
        elif "LightningModule" in kinds:
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
