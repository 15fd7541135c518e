"""Fold the active updates into the base weights, and back: merge, unmerge, merged().

A merged weight is computed from the pristine base in the widest float there is and rounded once.
The base weight itself is never written, so `unmerge` only has to drop the merged one.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora.layer import LoRALinear
from lora.layout import out_in_view
from lora.rounding import MergeReport, Rounding, agreement, logits, rounding
from lora.tree import Tree, survey, survey_adapted
from lora.undo import all_or_nothing


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
        before = logits(model, verify)
        report = fold(tree)
        return MergeReport(report, agreement(before, logits(model, verify)))


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
        faults = [
            f"{' and '.join(o.path for o in having)} are one tensor" for having in shared.values()
        ]
        raise ValueError("; ".join(faults) + ". Merging would change both; leave them unmerged.")
    if hollow := [path for path, layer in layers.items() if layer.weight.is_meta]:
        raise ValueError(f"{hollow[0]} is on the meta device, which holds no values.")
    weights: dict[str, Tensor] = {}
    report: dict[str, Rounding] = {}
    faults: list[str] = []
    for path, layer in layers.items():
        ideal = layer.ideal()
        weights[path] = _rounded(layer, ideal)
        report[path] = rounding(layer, ideal, weights[path])
        if not torch.isfinite(weights[path]).all():
            faults.append(_where_not_finite(path, layer, weights[path]))
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError("; ".join(faults[:5]) + more + ".")
    if off := [path for path, cost in report.items() if not cost.max_error <= cost.bound]:
        raise RuntimeError(f"Merged weights are out of their rounding bound: {', '.join(off)}.")
    with all_or_nothing(layers.values()):
        for path, layer in layers.items():
            layer.merged_weight, layer.merged_bias = weights[path], _bias(layer)
    return report


@torch.no_grad()
def refold(tree: Tree) -> None:
    """Fold what is in force, whatever was folded before and without looking at it."""
    for layer in tree.layers.values():
        layer.merged_weight, layer.merged_bias = _rounded(layer, layer.ideal()), _bias(layer)


@torch.no_grad()
def keep_folded(tree: Tree) -> None:
    """Make the merged weights, and the copies in force, the bases' own.

    Raises:
        ValueError: a copied module shares a weight with another.
    """
    if shared := tree.shared_weights(tree.copies):
        names = " and ".join(owner.path for owner in next(iter(shared.values())))
        raise ValueError(f"{names} are one tensor. Keeping a copy would change both.")
    for layer in tree.layers.values():
        for name, merged in (("weight", layer.merged_weight), ("bias", layer.merged_bias)):
            if merged is not None:
                _keep(layer.base, name, merged)
    for module in tree.copies.values():
        for name, trained in module.in_force.named_parameters():
            owner, _, last = name.rpartition(".")
            _keep(module.base.get_submodule(owner), last, trained.detach())


def _keep(module: nn.Module, name: str, value: Tensor) -> None:
    parameter = module.get_parameter(name)
    if parameter.is_inference():  # which cannot be written outside of that mode
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    else:
        parameter.data = value


def _rounded(layer: LoRALinear, ideal: Tensor) -> Tensor:
    """The ideal weight `(out, in)` rounded once, in the base's layout; never the base's own."""
    base = layer.base.get_parameter("weight")
    weight = out_in_view(layer.base, ideal).to(base.dtype).contiguous()
    return weight.clone() if weight.data_ptr() == base.data_ptr() else weight


def _bias(layer: LoRALinear) -> Tensor | None:
    bias = layer.trained_bias()
    return None if bias is None else bias.detach().clone()


def _unfold(tree: Tree) -> None:
    for layer in tree.layers.values():
        layer.merged_weight = layer.merged_bias = None


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
