"""One survey of a model: what it is made of, which layers are adapted, what shares memory.

A verb surveys the model once and hands the `Tree` on; nothing asks the model again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, cast

from torch import Tensor, nn

from lora.adapted import Adapted
from lora.copies import ModuleCopy
from lora.layer import LoRALinear
from lora.stacked import StackedLinear
from lora.untyped import is_sharded


class Place(NamedTuple):
    """Where a module stands: as the child `name` of `parent`, at the dotted `path`."""

    path: str
    parent: nn.Module
    name: str


class Owner(NamedTuple):
    """Who has a tensor: `module`, as `name`; `path` is the tensor's own."""

    path: str
    module: nn.Module
    name: str


@dataclass(frozen=True)
class Tree:
    """A model as one walk found it.

    Args:
        root: the model, without the wrappers around it.
        bases: every module as if the model had never been injected, by its first path.
        adapted: the adapted modules by their first path.
        places: every place of each module, by the module's id.
        order: every path, in the order of the walk.
    """

    root: nn.Module
    bases: dict[str, nn.Module]
    adapted: dict[str, Adapted]
    places: dict[int, list[Place]]
    order: list[str]

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
            raise ValueError(f"There is no adapter {str(adapter)[:80]!r} here ({self.named()}).")
        return {path: a for path, a in self.adapted.items() if adapter in a.updates}

    def named(self) -> str:
        """What a message says of the adapters that are there."""
        return f"there are: {', '.join(self.adapters)}" if self.adapters else "there is none"

    def paths(self, modules: Iterable[nn.Module]) -> list[str]:
        """Every path of these modules, in the order of the walk."""
        wanted = {place.path for module in modules for place in self.places[id(module)]}
        return [path for path in self.order if path in wanted]

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
        if any(map(is_sharded, self.root.parameters())):
            raise RuntimeError(
                "The model is sharded, and can only be run, trained and saved: inject, load, merge "
                "and eject before fully_shard."
            )

    def refuse_merged(self) -> None:
        """Raise where a merged weight would go stale."""
        if self.is_merged:
            raise RuntimeError("The model is merged. Call lora.unmerge first.")

    @property
    def is_merged(self) -> bool:
        """Whether a weight is folded."""
        return any(layer.merged_weight is not None for layer in self.layers.values())

    def shared_weights(self, paths: Iterable[str]) -> dict[str, list[Owner]]:
        """For each module at `paths` whose weights share memory with another's: who has them.

        A module that shares with none is left out.
        """
        found: dict[str, list[Owner]] = {}
        for path in paths:
            base = self.bases[path]
            inside = set(base.modules())
            spans = [_span(parameter) for parameter in base.parameters() if parameter.dim() > 1]
            sharing = [
                owner
                for (start, stop), owner in self._owners
                if any(start < b and a < stop for a, b in spans)
            ]
            if any(owner.module not in inside for owner in sharing):
                found[path] = sharing
        return found

    @cached_property
    def _owners(self) -> list[tuple[tuple[int, int], Owner]]:
        return [
            (_span(tensor), Owner(f"{prefix}.{name}" if prefix else name, module, name))
            for prefix, module in self.bases.items()
            for name, tensor in _own_tensors(module)
        ]


def survey(model: nn.Module) -> Tree:
    """Walk a model once; the walk stops at an adapted module, whatever hangs below it.

    Raises:
        ValueError: it is no module, or a module contains itself.
        RuntimeError: the model runs under a population.
    """
    root = unwrap(model)
    bases: dict[str, nn.Module] = {}
    adapted: dict[str, Adapted] = {}
    places: dict[int, list[Place]] = defaultdict(list[Place])
    order: list[str] = []
    for module, place, first in _walk(root):
        if place is not None:
            places[id(module)].append(place)
        path = "" if place is None else place.path
        order.append(path)
        if not first:
            continue
        if isinstance(module, StackedLinear):
            raise RuntimeError(
                "The model runs under a population. Call its eject(), or work within its adapter()."
            )
        if isinstance(module, Adapted):
            adapted[path] = module
            module = module.base
        bases[path] = module  # what a compiled wrapper holds stands under the wrapper's path
    return Tree(root, bases, adapted, places, order)


def survey_adapted(model: nn.Module) -> Tree:
    """As `survey`, but a model without any adapter is a RuntimeError."""
    tree = survey(model)
    if not tree.adapted:
        raise RuntimeError("The model carries no adapter. Call lora.inject or lora.load first.")
    return tree


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's, DataParallel's or DistributedDataParallel's wrapper."""
    if not isinstance(cast(object, model), nn.Module):
        raise ValueError(f"The model must be a torch.nn.Module, got {type(model).__name__}.")
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, parallel):
            model = cast(nn.Module, model.module)
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses that a tensor takes; one on the meta device has none but its own identity."""
    start = tensor.data_ptr()
    if not start or not tensor.numel():
        return -id(tensor), -id(tensor) + 1
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def _walk(root: nn.Module) -> Iterator[tuple[nn.Module, Place | None, bool]]:
    """Every place of every module, parents first, and whether it is the module's first.

    A stack of its own: a model may be deeper than Python's.
    """
    seen: set[int] = set()
    stack: list[tuple[nn.Module, Place | None, tuple[int, ...]]] = [(root, None, ())]
    while stack:
        module, place, above = stack.pop()
        first = id(module) not in seen
        seen.add(id(module))
        yield module, place, first
        if isinstance(module, Adapted):
            continue
        path, above = "" if place is None else place.path, (*above, id(module))
        for name, child in reversed(_children(module)):
            if id(child) in above:
                raise ValueError(f"{path or 'The model'} contains itself as {name!r}.")
            stack.append((child, Place(_joined(path, name), module, name), above))


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    children = module._modules  # pyright: ignore[reportPrivateUsage]  # with duplicates
    return [(name, child) for name, child in children.items() if child is not None]


def _joined(path: str, name: str) -> str:
    """A module that is compiled in its place keeps its path: keys are those of the plain model."""
    if name == "_orig_mod":
        return path
    return f"{path}.{name}" if path else name
