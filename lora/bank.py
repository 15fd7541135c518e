"""Several adapters on one model: which are there, which are in force."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import cast

from torch import nn

from lora.config import UpdateConfig, is_finite
from lora.injection import detach
from lora.layer import LoRALinear, LowRankUpdate
from lora.merging import is_merged, merge, unmerge
from lora.targets import lora_layers, require_layers, require_settled

Mixture = str | Mapping[str, float]
"""An adapter's name, or names with the weights of their updates in the sum."""


def adapters(model: nn.Module) -> dict[str, dict[str, UpdateConfig]]:
    """Every adapter by name, with the config of each of its layers by dotted path."""
    layers = require_layers(model)
    return {
        name: {
            path: cast(LowRankUpdate, layer.updates[name]).config
            for path, layer in layers.items()
            if name in layer.updates
        }
        for name in adapter_names(layers)
    }


def active(model: nn.Module) -> dict[str, float]:
    """The adapters in force, each with the weight of its updates in the sum."""
    return {n: w for layer in require_layers(model).values() for n, w in layer.active.items()}


def activate(model: nn.Module, mixture: Mixture) -> None:
    """Put one adapter, or a weighted sum of several, in force; only these require grad.

    Args:
        model: a model with adapters.
        mixture: a name, or `{"legal": 0.7, "poet": 0.3}` for exactly that sum of the updates; an
            empty one leaves the base alone.

    Raises:
        ValueError: a name that the model does not carry, or a weight that is not finite.
        RuntimeError: no adapter here, or the model is merged or routed.
    """
    layers = require_layers(model)
    require_settled(layers)
    weights = as_mixture(mixture, layers)
    for layer in layers.values():
        layer.activate(weights)


@contextmanager
def activated(model: nn.Module, mixture: Mixture) -> Generator[None]:
    """Within the context the mixture is in force; after it, what was before.

    Raises:
        ValueError, RuntimeError: as `activate`.
    """
    before = active(model)
    activate(model, mixture)
    try:
        yield
    finally:
        layers = lora_layers(model)  # the body may have injected, or ejected all
        folded = bool(layers) and is_merged(model)  # what is restored must be folded in its place
        if folded:
            unmerge(model)
        for layer in layers.values():
            layer.activate(before)
        if folded:
            merge(model)


def remove(model: nn.Module, adapter: str) -> list[str]:
    """Take one adapter off; a layer that carries no other goes back to its base.

    Args:
        model: a model with adapters.
        adapter: its name. If it was in force, the others in force stay so.

    Returns:
        The dotted paths of the layers that carried it.

    Raises:
        ValueError: the model carries no such adapter.
        RuntimeError: no adapter here, or the model is merged or routed.
    """
    layers = require_layers(model)
    require_settled(layers)
    if adapter not in (names := adapter_names(layers)):
        raise ValueError(f"no adapter {adapter!r} here (there are: {', '.join(names)}).")
    carrying = {path: layer for path, layer in layers.items() if adapter in layer.updates}
    for layer in carrying.values():
        layer.activate({n: w for n, w in layer.active.items() if n != adapter})
        del layer.updates[adapter]
    detach(model, {p: layer for p, layer in carrying.items() if not len(layer.updates)})
    return list(carrying)


@contextmanager
def disabled(model: nn.Module) -> Generator[None]:
    """Within the context the model computes exactly what its base does, merged, routed or not.

    Raises:
        RuntimeError: no adapter here.
    """
    before = [(layer, layer.enabled) for layer in require_layers(model).values()]
    for layer, _ in before:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in before:
            layer.enabled = enabled


def adapter_names(layers: Mapping[str, LoRALinear]) -> list[str]:
    """Every adapter's name, in the order in which layers first carry them."""
    return list(dict.fromkeys(name for layer in layers.values() for name in layer.updates))


def as_mixture(mixture: Mixture, layers: Mapping[str, LoRALinear]) -> dict[str, float]:
    """The mixture as names with weights.

    Raises:
        ValueError: listing each name that the layers do not carry, and each weight that is not a
            finite number.
    """
    if not isinstance(cast(object, mixture), str | Mapping):
        raise ValueError(f"Give an adapter's name, or names with weights, not {mixture!r}.")
    weights = {mixture: 1.0} if isinstance(mixture, str) else dict(mixture)
    faults = [
        f"no adapter {name!r} here (there are: {', '.join(adapter_names(layers))})"
        for name in weights
        if not any(name in layer.updates for layer in layers.values())
    ]
    faults += [
        f"the weight of {name!r} must be a finite number, got {weight!r}"
        for name, weight in weights.items()
        if not is_finite(weight)
    ]
    if faults:
        raise ValueError("; ".join(faults) + ".")
    return weights
