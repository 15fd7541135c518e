"""What merging costs: how far weights are from the ideal, and logits from the unmerged model's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora.layer import LoRALinear
from lora.layout import out_in_view
from lora.messages import cut, html_table


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


@dataclass(frozen=True, repr=False)
class MergeReport:
    """What merging cost: by layer, and for the whole model if it was asked to verify."""

    layers: dict[str, Rounding]
    agreement: Agreement | None

    def __str__(self) -> str:
        shown = self._facts()
        return "; ".join([shown.pop("merged"), *(f"{k} {v}" for k, v in shown.items())])

    def __repr__(self) -> str:
        return f"<MergeReport: {self}>"  # hundreds of layers would fill the screen

    def _repr_html_(self) -> str:
        worst = max(self.layers, key=lambda name: self.layers[name].max_error, default=None)
        return html_table(self._facts() | ({} if worst is None else {"in": worst}))

    def _facts(self) -> dict[str, str]:
        worst = max(self.layers.values(), key=lambda layer: layer.max_error, default=None)
        if worst is None:
            return {"merged": "no layer merged"}
        error = f"{worst.max_error:.2g} (bound {worst.bound:.2g})"
        facts = {"merged": f"{len(self.layers)} layers merged", "largest error": error}
        if seen := self.agreement:
            facts["logits differ by"] = f"{seen.max_difference:.2g}"
            facts["likeliest tokens changed"] = f"{seen.flips:,} of {seen.positions:,}"
        return facts


def rounding(layer: LoRALinear, ideal: Tensor, weight: Tensor) -> Rounding:
    """How far a merged weight, in the base's layout, is from the ideal, `(out, in)`."""
    error = (out_in_view(layer.base, weight).to(ideal.dtype) - ideal).abs()
    limits = torch.finfo(weight.dtype)
    # A 16-bit weight passes through float32 on its way: a hair more than half a unit.
    bound = 0.5001 * limits.eps * float(ideal.abs().max()) + limits.smallest_normal * limits.eps
    return Rounding(float(error.max()), float(error.square().mean().sqrt()), bound)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's float32 logits; transformers' models return an object that holds them."""
    try:
        output = model(ids)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"model(verify) fails: {cut(error)}.") from error
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ValueError(f"model(verify) gives no logits, but {type(output).__name__}.")
    return logits


def agreement(unmerged: Tensor, merged: Tensor) -> Agreement:
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
