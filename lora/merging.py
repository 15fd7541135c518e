"""Merging: a weight beside the base's, computed from it in the widest float and rounded once."""

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lora.copies import ModuleCopy
from lora.layer import LoRALinear
from lora.layout import is_hooked, out_in_view
from lora.tree import Tree, refuse, survey, survey_adapted


@torch.no_grad()
def merge(model: nn.Module) -> dict[str, float]:
    """Fold the active updates into the weights: a forward pass then costs what the base's does.

    Args:
        model: a model with adapters, in eval mode if they have dropout.

    Returns:
        By layer, how far the merged weight is from the unrounded one at most.

    Raises:
        RuntimeError: no adapter here, merged or routed already, or in training mode with dropout.
        ValueError: listing each weight that cannot be merged, or would not be finite.
    """
    tree = survey_adapted(model)
    tree.require_settled()
    refuse(tree.shared_weights(tree.layers), "{} are one tensor. Merging would change both.")
    faults: list[str] = []
    weights: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    for path, layer in tree.layers.items():
        if any(update.drop_rate for update, _ in layer.active_updates()):
            raise RuntimeError(f"{path} trains with dropout. Call model.eval() before merging.")
        if is_hooked(layer.base) or is_traceable_wrapper_subclass(layer.weight_out_in):
            faults.append(f"{path} cannot be merged: a hook moves its weight, or it is quantised")
            continue
        weights[path], errors[path] = _folded(layer)
        if not math.isfinite(errors[path]):
            faults.append(f"the merged weight of {path} has NaN or infinite values")
    refuse(faults)
    for path, layer in tree.layers.items():
        layer.merge(weights[path])
    return errors


def unmerge(model: nn.Module) -> None:
    """Go back to the base weights and the updates beside them, to the byte.

    Raises:
        RuntimeError: no adapter here, or the model is not merged.
    """
    tree = survey_adapted(model)
    if not tree.is_merged:
        raise RuntimeError("The model is not merged.")
    unfold(tree)


def is_merged(model: nn.Module) -> bool:
    """Whether the active updates are folded into the weights.

    Raises:
        RuntimeError: no adapter here.
    """
    return survey_adapted(model).is_merged


@contextmanager
def merged(model: nn.Module) -> Generator[None]:
    """Within the context the model is merged; after it, as it was before.

    Raises:
        RuntimeError, ValueError: as `merge`.
    """
    before = survey_adapted(model).is_merged
    if not before:
        merge(model)
    try:
        yield
    finally:
        tree = survey(model)  # the body may have ejected all
        (refold if before else unfold)(tree)


def unfold(tree: Tree) -> None:
    for layer in tree.layers.values():
        layer.merge(None)


@torch.no_grad()
def refold(tree: Tree) -> None:
    """Fold what is in force now."""
    for layer in tree.layers.values():
        layer.merge(_folded(layer)[0])


@torch.no_grad()
def keep_folded(tree: Tree) -> None:
    """Write the merged weights, and the copies in force, into the bases."""
    refuse(tree.shared_weights(tree.copies), "{} are one tensor. Keeping a copy would change both.")
    for layer in tree.layers.values():
        if layer.merged is not None:
            layer.base.get_parameter("weight").data = layer.merged.get_parameter("weight").data
    for module in tree.copies.values():
        for name, trained in cast(ModuleCopy, module).in_force.named_parameters():
            module.base.get_parameter(name).data = trained.detach()


def _folded(layer: LoRALinear) -> tuple[Tensor, float]:
    """The ideal weight rounded once, in the base's layout, and its largest error."""
    ideal = layer.ideal()
    rounded = ideal.to(layer.weight_out_in.dtype, copy=True)
    error = float((rounded.to(ideal.dtype) - ideal).abs().max())
    return out_in_view(layer.base, rounded).contiguous(), error
