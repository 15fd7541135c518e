"""Several adapters on one model: which are there, which are in force."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from lora.config import UpdateConfig, is_finite
from lora.injection import detach
from lora.merging import refold
from lora.tree import Tree, survey, survey_adapted
from lora.undo import all_or_nothing
from lora.updates import LowRankUpdate

Mixture = str | Mapping[str, float]
"""An adapter's name, or names with the weights of their updates in the sum."""


def adapters(model: nn.Module) -> dict[str, dict[str, UpdateConfig]]:
    """Every adapter by name, with the config of each of its layers by dotted path."""
    tree = survey_adapted(model)
    return {
        name: {
            path: layer.update(name).config
            for path, layer in tree.layers.items()
            if name in layer.updates
        }
        for name in tree.adapters
    }


def active(model: nn.Module) -> dict[str, float]:
    """The adapters in force, each with the weight of its updates in the sum."""
    return active_in(survey_adapted(model))


def activate(model: nn.Module, mixture: Mixture) -> None:
    """Put one adapter, or a weighted sum of several, in force; only these require grad.

    What was frozen in an adapter stays frozen: `requires_grad` is put back as it was when the
    adapter was last in force.

    Args:
        model: a model with adapters.
        mixture: a name, or `{"legal": 0.7, "poet": 0.3}` for exactly that sum of the updates; an
            empty one leaves the base alone.

    Raises:
        ValueError: a name that the model does not carry, or a weight that is not finite.
        RuntimeError: no adapter here, or the model is merged or routed.
        The model is as it was after any error, Ctrl-C included.
    """
    tree = survey_adapted(model)
    tree.require_settled()
    weights = as_mixture(mixture, tree)
    with all_or_nothing(_parts(tree)):
        for module in tree.adapted.values():
            module.activate(weights)


@contextmanager
def activated(model: nn.Module, mixture: Mixture) -> Generator[None]:
    """Within the context the mixture is in force; after it, what was before.

    A loss made within must have its backward pass within; later it is an error.

    Raises:
        ValueError, RuntimeError: as `activate`.
    """
    tree = survey_adapted(model)
    tree.require_settled()
    weights, before = as_mixture(mixture, tree), active_in(tree)

    def restore() -> None:
        tree = survey(model)  # the body may have injected, or ejected all
        for module in tree.adapted.values():
            module.activate(before)
        if tree.is_merged:
            refold(tree)  # what is restored must be folded in its place

    try:
        try:
            for module in tree.adapted.values():
                module.activate(weights)
            yield
        finally:
            restore()
    finally:
        restore()  # once more: Ctrl-C may have cut it short


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
        The model is as it was after any error, Ctrl-C included.
    """
    tree = survey_adapted(model)
    tree.require_settled()
    carrying = tree.carrying(adapter)
    with all_or_nothing(tree.root.modules()):
        for module in carrying.values():
            module.drop(adapter)
        detach(tree, {p: module for p, module in carrying.items() if not len(module.updates)})
    return list(carrying)


@contextmanager
def disabled(model: nn.Module) -> Generator[None]:
    """Within the context the model computes exactly what its base does, merged, routed or not.

    Contexts may overlap in any order; the model is enabled when the last one ends.

    Raises:
        RuntimeError: no adapter here.
    """
    modules = list(survey_adapted(model).adapted.values())
    context = object()

    def restore() -> None:
        for module in modules:
            module.pause(context, begins=False)

    try:
        try:
            for module in modules:
                module.pause(context, begins=True)
            yield
        finally:
            restore()
    finally:
        restore()  # once more: Ctrl-C may have cut it short


def active_in(tree: Tree) -> dict[str, float]:
    """As `active`, of a model that has been surveyed."""
    return {n: w for module in tree.adapted.values() for n, w in module.active.items()}


def as_mixture(mixture: Mixture, tree: Tree) -> dict[str, float]:
    """The mixture as names with weights.

    Raises:
        ValueError: listing each name that the model does not carry, and each weight that is not a
            finite number, or with which an update's scaling would be none.
    """
    if not isinstance(cast(object, mixture), str | Mapping):
        shown = repr(mixture)[:80]
        raise ValueError(f"Give an adapter's name, or names with weights, not {shown}.")
    weights = {mixture: 1.0} if isinstance(mixture, str) else dict(mixture)
    names = tree.adapters
    faults = [
        f"no adapter {str(name)[:80]!r} here (there are: {', '.join(names)})"
        for name in weights
        if name not in names
    ]
    faults += [
        f"the weight of {str(name)[:80]!r} must be a finite number, got {repr(weight)[:80]}"
        for name, weight in weights.items()
        if not is_finite(weight)
    ]
    faults += [
        f"the weight of {name!r:.80}, {weights[name]:.3g}, is more than its updates hold"
        for name in weights
        if not faults and abs(weights[name]) > 1 and _overflows(tree, name, weights[name])
    ]
    for path, module in tree.copies.items():
        having = [name for name in weights if name in module.updates]
        if len(having) > 1 or any(weights[name] != 1 for name in having):
            faults.append(f"{' and '.join(having)} train copies of {path}, which have no mixture")
    if faults:
        raise ValueError("; ".join(faults[:5]) + ".")
    return {name: float(weight) for name, weight in weights.items()}


def _overflows(tree: Tree, name: str, weight: float) -> bool:
    """Whether a weight takes the scaling of an update out of the range of its factors."""
    updates = (layer.updates[name] for layer in tree.layers.values() if name in layer.updates)
    return any(
        abs(weight) * update.config.scaling > torch.finfo(update.A.dtype).max
        for update in updates
        if isinstance(update, LowRankUpdate)
    )


def _parts(tree: Tree) -> Iterator[nn.Module]:
    """All that switching changes."""
    for module in tree.adapted.values():
        yield module
        yield from module.updates.modules()
