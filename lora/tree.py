"""One survey of a model: what it is made of, which layers are adapted, what shares a weight."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from lora.layer import Adapted, LoRALinear

WRAPPERS = frozenset(
    "DataParallel DistributedDataParallel AveragedModel OptimizedModule LightningModule".split()
)


@dataclass(frozen=True)
class Tree:
    """A model as one walk sees it; what is shared is at its first path."""

    model: nn.Module  # what was surveyed
    root: nn.Module  # the model without the wrappers around it
    bases: dict[str, nn.Module]  # every module, as if the model had never been injected
    adapted: dict[str, Adapted]
    uses: dict[str, list[tuple[str, nn.Module, str]]]  # all paths, each with parent and name there

    @cached_property
    def layers(self) -> dict[str, LoRALinear]:
        return {path: a for path, a in self.adapted.items() if isinstance(a, LoRALinear)}

    @cached_property
    def copies(self) -> dict[str, Adapted]:
        return {path: a for path, a in self.adapted.items() if path not in self.layers}

    @property
    def adapters(self) -> list[str]:
        return list(dict.fromkeys(name for a in self.adapted.values() for name in a.updates))

    def carrying(self, adapter: str) -> dict[str, Adapted]:
        if adapter not in self.adapters:
            raise ValueError(f"There is no adapter {adapter!r} here ({self.named()}).")
        return {path: a for path, a in self.adapted.items() if adapter in a.updates}

    def named(self) -> str:
        return f"there are: {', '.join(self.adapters)}" if self.adapters else "there is none"

    def paths(self, first: Collection[str]) -> list[str]:
        """Every path of the modules at these first paths, in the order of the model."""
        return [path for key in self.uses if key in first for path, _, _ in self.uses[key]]

    def replace(self, new: Mapping[str, nn.Module]) -> None:
        """Put each module wherever that of its first path is."""
        for path, module in new.items():
            for _, parent, name in self.uses[path]:
                parent.register_module(name, module)

    def require_settled(self) -> None:
        """Raise where a change would leave a merged weight, a routing or a shard stale."""
        if self.is_sharded:
            raise RuntimeError("The model is sharded, too late for this: do it before fully_shard.")
        self.require_unmerged()
        if any(layer.routing is not None for layer in self.layers.values()):
            raise RuntimeError("The model is routed. Leave the lora.routed context first.")

    def require_unmerged(self) -> None:
        if self.is_merged:
            raise RuntimeError("The model is merged. Call lora.unmerge, or eject with merge=True.")

    def refuse_ddp(self) -> None:
        """DDP has looked up already what is trained."""
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            raise RuntimeError("Inject and activate before you wrap the model in DDP.")

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the parameters."""
        return any(hasattr(parameter, "full_tensor") for parameter in self.root.parameters())

    @property
    def is_merged(self) -> bool:
        return any(layer.merged is not None for layer in self.layers.values())

    def shared_weights(self, paths: Iterable[str]) -> list[str]:
        """The names of each tensor that a module at `paths` shares with another."""
        names: dict[int, list[str]] = defaultdict(list)
        for path, module in self.bases.items():
            for name, parameter in module.named_parameters(recurse=False):
                names[_address(parameter)].append(f"{path}.{name}".removeprefix("."))
        shared: dict[str, None] = {}
        for path in paths:
            for parameter in self.bases[path].parameters():
                uses = names[_address(parameter)]
                if not all(name.startswith(f"{path}.") for name in uses):
                    shared[" and ".join(uses)] = None
        return list(shared)


def survey(model: nn.Module) -> Tree:
    """Walk a model once, down to its adapted modules."""
    tree = Tree(model, unwrap(model), {}, {}, {})
    first: dict[nn.Module, str] = {}

    def visit(module: nn.Module, path: str, parent: nn.Module | None, name: str) -> None:
        if "_orig_mod" in module._modules:  # compiled: what it wraps keeps the path
            module, parent, name = module.get_submodule("_orig_mod"), module, "_orig_mod"
        if getattr(type(module), "is_stacked", False):
            raise RuntimeError("The model runs under a population. Call its eject() first.")
        if type(module).__name__ == "FullyShardedDataParallel":
            raise RuntimeError("FSDP1 flattens weights. Inject, and use torch's fully_shard.")
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
    """As `survey`, of a model that carries an adapter."""
    tree = survey(model)
    if not tree.adapted:
        raise RuntimeError("The model carries no adapter. Call lora.inject first.")
    return tree


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside wrappers such as DDP's."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"The model must be a torch.nn.Module, got {type(model).__name__}.")
    while WRAPPERS & {cls.__name__ for cls in type(model).__mro__}:
        inner = [child for child in model.children() if any(True for _ in child.parameters())]
        if len(inner) != 1:
            break
        model = inner[0]
    return model


def refuse(faults: Sequence[str], message: str = "{}.") -> None:
    """Raise a ValueError that lists the faults, if there are any."""
    if faults:
        raise ValueError(message.replace("{}", listed(faults)))


def listed(faults: Sequence[str]) -> str:
    """The first faults, and how many more there are."""
    more = [f"and {len(faults) - 12} more"] if len(faults) > 12 else []
    return "; ".join([*faults[:12], *more])


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr() or id(tensor)
    except RuntimeError:  # a quantised tensor without memory
        return id(tensor)
