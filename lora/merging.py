"""Fold the active updates into the base weights, and back: merge, unmerge, merged().

A merged weight is computed from the pristine base in the widest float there is and rounded once.
The base weight itself is never written, so `unmerge` only has to drop the merged one.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora.layer import LoRALinear
from lora.layout import out_in_view
from lora.tree import Tree, all_or_nothing, survey, survey_adapted


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


def merge(model: nn.Module, *, verify: Tensor | None = None) -> MergeReport:
    """Fold the active updates into the weights, so that a forward pass costs what the base's does.

    The model's state dict still holds the base's weights and the adapters; `lora.eject(model,
    merge=True)` makes the merged weights the model's own.

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
        The model is as it was after any error, Ctrl-C included.
    """
    tree = survey_adapted(model)
    if verify is None:
        return MergeReport(fold(tree), None)
    with torch.no_grad(), all_or_nothing(tree.layers.values()):
        before = _logits(model, verify)
        report = fold(tree)
        return MergeReport(report, _agreement(before, _logits(model, verify)))


def unmerge(model: nn.Module) -> None:
    """Go back to the base weights and the updates beside them; the base's bytes were never touched.

    Raises:
        RuntimeError: no adapter here, or the model is not merged.
    """
    tree = survey_adapted(model)
    if not tree.is_merged:
        raise RuntimeError("The model is not merged.")
    with all_or_nothing(tree.layers.values()):
        _unfold(tree)


def is_merged(model: nn.Module) -> bool:
    """Whether the active updates are folded into the weights.

    Raises:
        RuntimeError: no adapter here.
    """
    return survey_adapted(model).is_merged


@contextmanager
def merged(model: nn.Module) -> Generator[None]:
    """Within the context the model is merged; after it, merged or not as it was before.

    Raises:
        RuntimeError, ValueError: as `merge`.
    """
    before = survey_adapted(model).is_merged

    def restore() -> None:
        tree = survey(model)  # the body may have ejected all
        if before:
            refold(tree)  # without the checks of `merge`: no error here hides the body's
        else:
            _unfold(tree)

    try:
        try:
            if not before:
                merge(model)
            yield
        finally:
            restore()
    finally:
        restore()  # once more: Ctrl-C may have cut it short


@torch.no_grad()
def fold(tree: Tree) -> dict[str, Rounding]:
    """Merge a model that has been surveyed: by layer, what it cost.

    Raises:
        RuntimeError, ValueError: as `merge`; nothing is changed then.
    """
    tree.require_settled()
    layers = tree.layers
    if dropping := [path for path, layer in layers.items() if _drops(layer)]:
        raise RuntimeError(
            f"{dropping[0]} is in training mode with dropout on, which a merged weight cannot "
            "show. Call model.eval() first."
        )
    if shared := tree.shared_weights(layers):
        faults = [f"{' and '.join(n for n, *_ in o)} are one tensor" for o in shared.values()]
        raise ValueError("; ".join(faults) + ". Merging would change both; leave them unmerged.")
    weights: dict[str, Tensor] = {}
    report: dict[str, Rounding] = {}
    faults: list[str] = []
    for path, layer in layers.items():
        ideal = layer.ideal()
        weights[path] = _rounded(layer, ideal)
        report[path] = _rounding(layer, ideal, weights[path])
        if not torch.isfinite(weights[path]).all():
            faults.append(_where_not_finite(path, layer, weights[path]))
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError("; ".join(faults[:5]) + more + ".")
    if off := [path for path, cost in report.items() if not cost.max_error <= cost.bound]:
        raise RuntimeError(f"Merged weights are out of their rounding bound: {', '.join(off)}.")
    with all_or_nothing(layers.values()):
        for path, layer in layers.items():
            layer.merged_weight = weights[path]
    return report


@torch.no_grad()
def refold(tree: Tree) -> None:
    """Fold what is in force, whatever was folded before and without looking at it."""
    for layer in tree.layers.values():
        layer.merged_weight = _rounded(layer, layer.ideal())


@torch.no_grad()
def keep_folded(tree: Tree) -> None:
    """Make the merged weights the bases' own."""
    for layer in tree.layers.values():
        if layer.merged_weight is None:
            continue
        weight = layer.base.get_parameter("weight")
        if weight.is_inference():  # which cannot be written outside of that mode
            layer.base.weight = nn.Parameter(layer.merged_weight, requires_grad=False)
        else:
            weight.data = layer.merged_weight


def _rounded(layer: LoRALinear, ideal: Tensor) -> Tensor:
    """The ideal weight `(out, in)` rounded once, in the base's layout; never the base's own."""
    base = layer.base.get_parameter("weight")
    weight = out_in_view(layer.base, ideal).to(base.dtype).contiguous()
    return weight.clone() if weight.data_ptr() == base.data_ptr() else weight


def _rounding(layer: LoRALinear, ideal: Tensor, weight: Tensor) -> Rounding:
    """How far a merged weight, in the base's layout, is from the ideal, `(out, in)`."""
    error = (out_in_view(layer.base, weight).to(ideal.dtype) - ideal).abs()
    limits = torch.finfo(weight.dtype)
    # A 16-bit weight passes through float32 on its way: a hair more than half a unit.
    bound = 0.5001 * limits.eps * float(ideal.abs().max()) + limits.smallest_normal * limits.eps
    return Rounding(float(error.max()), float(error.square().mean().sqrt()), bound)


def _unfold(tree: Tree) -> None:
    for layer in tree.layers.values():
        layer.merged_weight = None


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's float32 logits; transformers' models return an object that holds them."""
    try:
        output = model(ids)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"model(verify) fails: {str(error)[:200]}.") from error
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ValueError(f"model(verify) gives no logits, but {type(output).__name__}.")
    return logits


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
