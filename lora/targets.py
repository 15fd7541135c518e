"""What stands where in a model: its adapted layers, its base layers, and those a target names.

A target is a dotted suffix of a module's path, matched on whole segments: `"c_attn"` fits
`transformer.h.0.attn.c_attn`, and `"attn.c_proj"` does not fit `transformer.h.0.mlp.c_proj`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from torch import nn

from lora.layer import LoRALinear, why_not_adaptable


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
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, parallel):
            model = cast(nn.Module, model.module)
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def refuse_merged(layers: Mapping[str, LoRALinear]) -> None:
    """Raise where a merged weight would go stale."""
    if any(layer.merged_weight is not None for layer in layers.values()):
        raise RuntimeError("The model is merged. Call lora.unmerge first.")


def find_targets(model: nn.Module, targets: str | Sequence[str]) -> dict[str, nn.Module]:
    """The base layers that `targets` name, by dotted path; a shared one under its first path.

    Raises:
        ValueError: listing each target that matches nothing, or something that cannot be adapted.
    """
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    if not targets or not all(targets):
        raise ValueError(f"targets must name at least one layer, got {targets!r}.")
    modules = base_modules(model)
    faults: list[str] = []
    found: set[str] = set()
    for target in targets:
        matches = {p: m for p, m in modules.items() if f".{p}".endswith(f".{target}")}
        unfit = {p: reason for p, m in matches.items() if (reason := why_not_adaptable(m))}
        if not matches:
            faults.append(f"No module matches target {target!r}.")
        elif unfit:
            path, reason = next(iter(unfit.items()))
            more = f" (and {len(unfit) - 1} more)" if len(unfit) > 1 else ""
            faults.append(f"Target {target!r} matches {path}{more}, but {reason}.")
        found |= matches.keys()
    if faults:
        raise ValueError(" ".join([*faults, _hint(modules)]))
    return {path: module for path, module in modules.items() if path in found}


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
        if path and not why_not_adaptable(module)
    }
    if not suffixes:
        return "There are no linear modules here."
    return f"Linear modules here end in: {', '.join(sorted(suffixes))}. Pass targets=(...)."
