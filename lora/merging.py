"""Fold the active updates into the base weights, and back: merge, unmerge, merged().

A merged weight is computed from the pristine base in the widest float there is and rounded once.
The base weight itself is never written, so `unmerge` only has to drop the merged one.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lora.layer import LoRALinear
from lora.layout import out_in_view, widest_float
from lora.targets import lora_layers, require_layers, require_settled, shared_weights, unwrap


@dataclass(frozen=True)
class Rounding:
    """How far a layer's merged weight is from the float64 ideal, and how far it may be."""

    max_error: float
    rms_error: float
    bound: float  # half a unit in the last place of the largest weight


@dataclass(frozen=True)
class Agreement:
    """How far the merged model's logits are from the unmerged model's."""

    max_difference: float
    kl: float  # of the merged from the unmerged distribution, nats a token, mean
    flips: int  # positions whose most likely token changed
    positions: int


@dataclass(frozen=True)
class MergeReport:
    """What merging cost: by layer, and for the whole model if it was asked to verify."""

    layers: dict[str, Rounding]
    agreement: Agreement | None


@torch.no_grad()
def merge(model: nn.Module, *, verify: Tensor | None = None) -> MergeReport:
    """Fold the active updates into the weights, so that a forward pass costs what the base's does.

    Args:
        model: a model with adapters, in eval mode if they have dropout.
        verify: token ids `(B, T)` on which to compare the merged and the unmerged logits of
            `model(verify)`.

    Returns:
        What it cost in precision.

    Raises:
        RuntimeError: no adapter here, merged or routed already, in training mode with dropout on,
            or a merged weight out of its bound, or verified logits that are not finite or off by
            more than the dtype explains.
        ValueError: listing each layer whose weight another module shares, or whose base weight or
            factors are not finite, or whose merged weight overflows.
        The model is as it was after any error.
    """
    layers = require_layers(model)
    require_settled(layers)
    if dropping := [path for path, layer in layers.items() if _drops(layer)]:
        raise RuntimeError(
            f"{dropping[0]} is in training mode with dropout on, which a merged weight cannot "
            "show. Call model.eval() first."
        )
    if faults := shared_weights(unwrap(model), layers):
        raise ValueError(
            "; ".join(faults.values()) + ". Merging would change both; leave them unmerged."
        )
    weights = {path: merged_weight(layer) for path, layer in layers.items()}
    if faults := [
        _where_not_finite(path, layers[path], weight)
        for path, weight in weights.items()
        if not torch.isfinite(weight).all()
    ]:
        raise ValueError("; ".join(faults) + ".")
    report = {path: _rounding(layer, weights[path]) for path, layer in layers.items()}
    if off := [path for path, cost in report.items() if not cost.max_error <= cost.bound]:
        raise RuntimeError(f"Merged weights are out of their rounding bound: {', '.join(off)}.")
    before = None if verify is None else _logits(model, verify)
    for path, layer in layers.items():
        layer.merged_weight = weights[path]
    if verify is None or before is None:
        return MergeReport(report, None)
    try:
        return MergeReport(report, _agreement(before, _logits(model, verify)))
    except BaseException:
        unmerge(model)
        raise


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
        if lora_layers(model) and is_merged(model) != before:  # the body may have ejected all
            (merge if before else unmerge)(model)


def ideal_weight(layer: LoRALinear) -> Tensor:
    """`W + Σ w·s·B A` of the active updates, `(out, in)`, in the widest float, unrounded."""
    weight = layer.weight_out_in
    ideal = weight.detach().to(widest_float(weight.device))
    for update, factor in layer.active_updates():
        ideal = ideal + factor * update.delta()
    return ideal


def merged_weight(layer: LoRALinear) -> Tensor:
    """The ideal weight rounded once to the base's dtype, in the base's layout."""
    weight = layer.base.get_parameter("weight")
    return out_in_view(layer.base, ideal_weight(layer)).to(weight.dtype).contiguous()


def _rounding(layer: LoRALinear, weight: Tensor) -> Rounding:
    ideal = ideal_weight(layer)
    error = (out_in_view(layer.base, weight).to(ideal.dtype) - ideal).abs()
    limits = torch.finfo(weight.dtype)
    # A 16-bit weight passes through float32 on its way: a hair more than half a unit.
    bound = 0.5001 * limits.eps * float(ideal.abs().max()) + limits.smallest_normal * limits.eps
    return Rounding(float(error.max()), float(error.square().mean().sqrt()), bound)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's float32 logits; transformers' models return an object that holds them."""
    output = model(ids)
    return cast(Tensor, getattr(output, "logits", output))


def _agreement(unmerged: Tensor, merged: Tensor) -> Agreement:
    """Compare logits `(B, T, V)`.

    Raises:
        RuntimeError: they are not finite, or differ by more than rounding explains.
    """
    slack = 64 * torch.finfo(merged.dtype).eps * float(unmerged.float().abs().max())
    p, q = (torch.log_softmax(x.float(), -1).flatten(0, -2) for x in (unmerged, merged))
    difference = float((merged.float() - unmerged.float()).abs().max())
    if not difference <= slack:
        raise RuntimeError(
            f"Merged and unmerged logits differ by {difference:.3g}, where {merged.dtype} explains "
            f"{slack:.3g} at most. The model is unmerged again."
        )
    return Agreement(
        max_difference=difference,
        kl=float((p.exp() * (p - q)).sum(-1).mean()),
        flips=int((p.argmax(-1) != q.argmax(-1)).sum()),
        positions=len(p),
    )


def _drops(layer: LoRALinear) -> bool:
    return any(update.drop_rate > 0 for update, _ in layer.active_updates())


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
