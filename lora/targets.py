"""What stands where in a model: its adapted layers, its base layers, and those a target names.

A target is a dotted suffix of a module's path, matched on whole segments: `"c_attn"` fits
`transformer.h.0.attn.c_attn`, and `"attn.c_proj"` does not fit `transformer.h.0.mlp.c_proj`.
`"c_attn[q,v]"` names two slices of such a layer, `"all-linear"` every linear layer but the head.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from lora.layer import LoRALinear
from lora.layout import why_not_adaptable
from lora.slices import split_target

T = TypeVar("T")
Targets = str | Sequence[str]


def lora_layers(model: nn.Module, *, every_path: bool = False) -> dict[str, LoRALinear]:
    """Every adapted layer by its dotted path; a shared one under its first path only by default.

    The walk stops at an adapted layer, so its cost does not grow with the number of adapters.
    """
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, LoRALinear]]:
        if id(module) in seen and not every_path:
            return
        seen.add(id(module))
        if isinstance(module, LoRALinear):
            yield path, module
            return
        children = module._modules  # pyright: ignore[reportPrivateUsage]  # with duplicates
        for name, child in children.items():
            if child is not None:
                yield from walk(child, f"{path}.{name}" if path else name)

    return dict(walk(unwrap(model), ""))


def require_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """As `lora_layers`, but a model without any is an error."""
    layers = lora_layers(model)
    if not layers:
        raise RuntimeError("The model carries no adapter. Call lora.inject or lora.load first.")
    return layers


def named_modules(model: nn.Module, *, every_path: bool = False) -> list[tuple[str, nn.Module]]:
    """Every module with its dotted path; a shared one under its first path only by default."""
    untyped = cast(Any, model)  # PyTorch leaves named_modules without a type
    return list(untyped.named_modules(remove_duplicate=not every_path))


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


def require_settled(layers: Mapping[str, LoRALinear]) -> None:
    """Raise where a change would leave a merged weight or a routing stale."""
    refuse_merged(layers)
    if any(layer.routing is not None for layer in layers.values()):
        raise RuntimeError("The model is routed. Leave the lora.routed context first.")


def refuse_merged(layers: Mapping[str, LoRALinear]) -> None:
    """Raise where a merged weight would go stale."""
    if any(layer.merged_weight is not None for layer in layers.values()):
        raise RuntimeError("The model is merged. Call lora.unmerge first.")


def find_targets(
    model: nn.Module,
    targets: Targets,
    exclude: Targets = (),
    layers: Iterable[int] | None = None,
) -> dict[str, tuple[str, ...]]:
    """The base layers that `targets` name, by dotted path, each with the slices asked for.

    A shared layer stands under its first path.

    Raises:
        ValueError: listing each target that matches nothing, or something that cannot be adapted,
            and each exclusion and layer number that matches no target.
    """
    modules = base_modules(model)
    head = getattr(unwrap(model), "get_output_embeddings", lambda: None)()  # transformers' models
    found, faults = _matches(modules, _as_tuple(targets, "targets"), head)
    for name in _as_tuple(exclude, "exclude"):
        excluded = [path for path in found if fits(path, name)]
        if not excluded:
            faults.append(f"exclude={name!r} matches no target.")
        found = {path: slices for path, slices in found.items() if path not in excluded}
    if layers is not None:
        wanted, present = _numbers(layers), {_block(path) for path in found}
        if missing := sorted(wanted - present):
            faults.append(f"layers={missing} match no target.")
        found = {path: slices for path, slices in found.items() if _block(path) in wanted}
    if not found and not faults:
        faults.append("Nothing is left of the targets.")
    if faults:
        raise ValueError(" ".join([*faults, _hint(modules)]))
    return {path: found[path] for path in modules if path in found}


def fits(path: str, suffix: str) -> bool:
    """Whether the dotted suffix fits the path on whole segments."""
    return f".{path}".endswith(f".{suffix}")


def by_pattern(
    pattern: Mapping[str, T] | None, paths: Collection[str], default: T, name: str
) -> dict[str, T]:
    """The value for each path: that of the first suffix in `pattern` that fits, or the default.

    Raises:
        ValueError: listing each suffix that fits no path.
    """
    pattern = {} if pattern is None else pattern
    if not isinstance(cast(object, pattern), Mapping):
        raise ValueError(f"{name} must map suffixes to values, got {pattern!r}.")
    if idle := [suffix for suffix in pattern if not any(fits(path, suffix) for path in paths)]:
        raise ValueError(f"{name} names {', '.join(map(repr, idle))}, which match no target.")
    return {
        path: next((value for suffix, value in pattern.items() if fits(path, suffix)), default)
        for path in paths
    }


def shared_weights(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """What to say, by path, of each layer at `paths` whose weight another module has too."""
    modules = base_modules(model)
    names: dict[int, list[str]] = defaultdict(list)
    for prefix, module in modules.items():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            names[_address(tensor)].append(f"{prefix}.{name}")
    same = {path: names[_address(modules[path].get_parameter("weight"))] for path in paths}
    return {
        path: f"{path}.weight is shared: {' and '.join(names)} are one tensor"
        for path, names in same.items()
        if len(names) > 1
    }


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() or id(tensor)  # a tensor on the meta device has no memory


def _matches(
    modules: Mapping[str, nn.Module], targets: tuple[str, ...], head: object
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """What the targets match, and what is wrong with them."""
    if not targets or not all(targets):
        raise ValueError(f"targets must name at least one layer, got {targets!r}.")
    found: dict[str, tuple[str, ...]] = {}
    faults: list[str] = []
    for target in targets:
        name, slices = split_target(target)
        everything = target == "all-linear"
        matches = (
            _all_linear(modules, head) if everything else [p for p in modules if fits(p, name)]
        )
        unfit = [path for path in matches if why_not_adaptable(modules[path])]
        if not matches and not everything:
            faults.append(f"No module matches target {target!r}.")
        elif unfit:
            more = f" (and {len(unfit) - 1} more)" if len(unfit) > 1 else ""
            reason = why_not_adaptable(modules[unfit[0]])
            faults.append(f"Target {target!r} matches {unfit[0]}{more}, but {reason}.")
        if twice := [path for path in matches if found.get(path, slices) != slices]:
            faults.append(f"Target {target!r} matches {twice[0]}, of which other slices are named.")
        found |= dict.fromkeys(matches, slices)
    return found, faults


def _all_linear(modules: Mapping[str, nn.Module], head: object) -> list[str]:
    """Every linear layer but the output head: the one called so, or tied to an embedding."""
    embeddings = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    return [
        path
        for path, module in modules.items()
        if path
        and not why_not_adaptable(module)
        and not isinstance(module, nn.Embedding)
        and module is not head
        and not fits(path, "lm_head")
        and id(module.weight) not in embeddings
    ]


def _block(path: str) -> int | None:
    """The number of the block that a layer is in: `transformer.h.3.mlp.c_fc` is in 3."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def _as_tuple(names: Targets, argument: str) -> tuple[str, ...]:
    several = _is_iterable(names) and not isinstance(names, str)
    entries = cast(tuple[str, ...], tuple(names) if several else (names,))
    if not all(isinstance(cast(object, entry), str) for entry in entries):
        raise ValueError(f"{argument} must be a name or several, got {names!r}.")
    return entries


def _is_iterable(value: object) -> bool:
    return isinstance(value, Iterable)


def _numbers(layers: Iterable[int]) -> set[int]:
    numbers = set(layers) if _is_iterable(layers) else set[int]()
    if not _is_iterable(layers) or not all(type(number) is int for number in numbers):
        raise ValueError(f"layers must be several block numbers, got {layers!r}.")
    return numbers


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the model as if it had never been injected, each under its first path."""
    model, layers = unwrap(model), lora_layers(model)
    inside = tuple(f"{path}." for path in layers)
    return {
        path: layers[path].base if path in layers else module
        for path, module in named_modules(model)
        if not path.startswith(inside)
    }


def _hint(modules: Mapping[str, nn.Module]) -> str:
    """What could have been asked for."""
    suffixes = {
        ".".join([s for s in path.split(".") if not s.isdigit()][-2:])
        for path, module in modules.items()
        if path and not why_not_adaptable(module) and not isinstance(module, nn.Embedding)
    }
    if not suffixes:
        return "There are no linear modules here."
    return f"Linear modules here end in: {', '.join(sorted(suffixes))}. Pass targets=(...)."
