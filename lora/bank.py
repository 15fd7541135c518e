"""Several adapters on one model: which are there, which are in force."""

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager

from torch import nn

from lora.config import UpdateConfig, as_number
from lora.injection import detach
from lora.merging import refold
from lora.tree import Tree, refuse, survey, survey_adapted

Mixture = str | Mapping[str, float]  # an adapter's name, or names with weights


def adapters(model: nn.Module) -> dict[str, dict[str, UpdateConfig]]:
    """Every adapter by name, with the config of each of its layers by dotted path."""
    tree = survey_adapted(model)
    configs: dict[str, dict[str, UpdateConfig]] = {name: {} for name in tree.adapters}
    for path, layer in tree.layers.items():
        for name in layer.updates:
            configs[name][path] = layer.update(name).config
    return configs


def active(model: nn.Module) -> dict[str, float]:
    """The adapters in force, each with the weight of its updates in the sum."""
    modules = survey_adapted(model).adapted.values()
    return {name: weight for module in modules for name, weight in module.active.items()}


def activate(model: nn.Module, mixture: Mixture) -> None:
    """Put one adapter, or a weighted sum of several, in force; only these are trained.

    Args:
        model: a model with adapters.
        mixture: a name, or `{"legal": 0.7, "poet": 0.3}`, or `{}` for the base alone.

    Raises:
        ValueError: an adapter that is not here, or a weight that is not finite.
        RuntimeError: no adapter here, or the model is merged, routed or wrapped in DDP.
    """
    tree = survey_adapted(model)
    tree.require_settled()
    tree.refuse_ddp()
    weights = as_mixture(mixture, tree)
    for module in tree.adapted.values():
        module.activate(weights)
        module.train_only(weights)


@contextmanager
def activated(model: nn.Module, mixture: Mixture) -> Generator[None]:
    """Within the context the mixture is in force; what is trained stays as it is.

    Raises:
        ValueError, RuntimeError: as `activate`.
    """
    tree = survey_adapted(model)
    tree.require_settled()
    weights, before = as_mixture(mixture, tree), active(model)
    for module in tree.adapted.values():
        module.activate(weights)
    try:
        yield
    finally:
        tree = survey(model)  # the body may have injected or ejected
        for module in tree.adapted.values():
            module.activate(before)
        if tree.is_merged:
            refold(tree)  # what is restored must be folded in its place


def remove(model: nn.Module, adapter: str) -> list[str]:
    """Take one adapter off; a layer that carries no other goes back to its base.

    Args:
        model: a model with adapters; others in force stay so.
        adapter: its name.

    Returns:
        The dotted paths of the layers that carried it.

    Raises:
        ValueError: the model carries no such adapter.
        RuntimeError: no adapter here, or the model is merged or routed.
    """
    tree = survey_adapted(model)
    tree.require_settled()
    carrying = tree.carrying(adapter)
    for module in carrying.values():
        module.activate({n: w for n, w in module.active.items() if n != adapter})
        module.resting.pop(adapter, None)
        del module.updates[adapter]
    detach(tree, {p: module for p, module in carrying.items() if not len(module.updates)})
    return list(carrying)


@contextmanager
def disabled(model: nn.Module) -> Generator[None]:
    """Within the context the model computes exactly what its base does, merged, routed or not.

    Raises:
        RuntimeError: no adapter here.
    """
    modules = list(survey_adapted(model).adapted.values())
    for module in modules:
        module.pauses += 1
    try:
        yield
    finally:
        for module in modules:
            module.pauses -= 1


def as_mixture(mixture: Mixture, tree: Tree) -> dict[str, float]:
    """The mixture as names with weights."""
    if not isinstance(mixture, str | Mapping):
        raise ValueError(f"Give a name, or names with weights, not {mixture!r:.80}.")
    given = {mixture: 1.0} if isinstance(mixture, str) else mixture
    weights = {name: as_number(weight) for name, weight in given.items()}
    faults: list[str] = []
    if missing := [repr(name) for name in weights if name not in tree.adapters]:
        faults.append(f"there is no adapter {', '.join(missing)} here ({tree.named()})")
    if infinite := [repr(name) for name, weight in weights.items() if not math.isfinite(weight)]:
        faults.append(f"the weight of {', '.join(infinite)} must be finite")
    for path, module in tree.copies.items():
        mixed = [name for name in weights if name in module.updates]
        if len(mixed) > 1 or any(weights[name] != 1 for name in mixed):
            faults.append(f"{' and '.join(mixed)} train copies of {path}, which have no mixture")
    refuse(faults)
    return {name: float(weight) for name, weight in weights.items()}
