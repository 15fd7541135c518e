"""Fold the active updates into the base weights, and back: merge, unmerge, merged().

A merged weight is computed from the pristine base in the widest float there is and rounded once.
The base weight itself is never written, so `unmerge` only has to drop the merged one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora.layer import LoRALinear, out_in_view, widest_float
from lora.targets import refuse_merged, require_layers, unwrap


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Fold the active updates into the weights, so that a forward pass costs what the base's does.

    Args:
        model: a model with adapters, in eval mode if they have dropout.

    Raises:
        RuntimeError: no adapter here, merged already, or in training mode with dropout on.
        ValueError: listing each layer whose weight another module shares, or whose base weight or
            factors are not finite, or whose merged weight overflows.
        The model is as it was after any error.
    """
    layers = require_layers(model)
    refuse_merged(layers)
    if dropping := [path for path, layer in layers.items() if _drops(layer)]:
        raise RuntimeError(
            f"{dropping[0]} is in training mode with dropout on, which a merged weight cannot "
            "show. Call model.eval() first."
        )
    if faults := _shared_weights(unwrap(model), layers):
        raise ValueError("; ".join(faults) + ". Merging would change both; leave them unmerged.")
    merged = {path: merged_weight(layer) for path, layer in layers.items()}
    if faults := [
        _where_not_finite(path, layers[path], w)
        for path, w in merged.items()
        if not torch.isfinite(w).all()
    ]:
        raise ValueError("; ".join(faults) + ".")
    for path, layer in layers.items():
        layer.merged_weight = merged[path]


def unmerge(model: nn.Module) -> None:
    """Go back to the base weights and the updates beside them; the base's bytes were never touched.

    Raises:
        RuntimeError: no adapter here, or the model is not merged.
    """
    layers = require_layers(model)
    if not is_merged(model):
        raise RuntimeError("The model is not merged.")
    for layer in layers.values():
        layer.merged_weight = None


def is_merged(model: nn.Module) -> bool:
    """Whether the active updates are folded into the weights.

    Raises:
        RuntimeError: no adapter here.
    """
    return any(layer.merged_weight is not None for layer in require_layers(model).values())


@contextmanager
def merged(model: nn.Module) -> Generator[None]:
    """Within the context the model is merged; after it, merged or not as it was before.

    Raises:
        RuntimeError, ValueError: as `merge`.
    """
    before = is_merged(model)
    if not before:
        merge(model)
    try:
        yield
    finally:
        if is_merged(model) != before:
            (merge if before else unmerge)(model)


def ideal_weight(layer: LoRALinear) -> Tensor:
    """`W + Σ w·s·B A` of the active updates, `(out, in)`, in the widest float, unrounded."""
    weight = layer.weight_out_in
    ideal = weight.to(widest_float(weight.device))
    for update, factor in layer.active_updates():
        ideal = ideal + factor * update.delta()
    return ideal


def merged_weight(layer: LoRALinear) -> Tensor:
    """The ideal weight rounded once to the base's dtype, in the base's layout."""
    weight = layer.base.get_parameter("weight")
    return out_in_view(layer.base, ideal_weight(layer)).to(weight.dtype).contiguous()


def _drops(layer: LoRALinear) -> bool:
    return any(u.training and u.config.dropout > 0 for u, _ in layer.active_updates())


def _shared_weights(model: nn.Module, layers: Mapping[str, LoRALinear]) -> list[str]:
    """A line for each adapted weight whose memory another parameter or buffer uses too."""
    names: dict[int, list[str]] = defaultdict(list)
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in tensors:
        names[tensor.data_ptr() or id(tensor)].append(name.replace(".base.", "."))
    faults: list[str] = []
    for path, layer in layers.items():
        weight = layer.base.get_parameter("weight")
        same = names[weight.data_ptr() or id(weight)]
        if len(same) > 1:
            faults.append(f"{path}.weight is shared: {' and '.join(same)} are one tensor")
    return faults


def _where_not_finite(path: str, layer: LoRALinear, merged: Tensor) -> str:
    tensors = {f"{path}.weight": layer.weight_out_in}
    for name in layer.active:
        tensors |= {
            f"{path} adapter {name!r} {k}": p for k, p in layer.updates[name].named_parameters()
        }
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        return f"{' and '.join(bad)} has NaN or infinite values"
    return f"the merged weight of {path} overflows {merged.dtype}"
