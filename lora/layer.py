"""One adapted layer: `y = x W + b + s · drop(x) Aᵀ Bᵀ`, with `s = alpha / r`. Read this first.

`LoRALinear` is the frozen base layer `x W + b` with its updates beside it; an update, one adapter's
`s · drop(x) Aᵀ Bᵀ`, is in `lora.updates`. Everything else in this package is bookkeeping around
these two.

Shapes: in, out features of the base layer · r rank · … any leading axes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lora.adapted import Adapted
from lora.fast import forms
from lora.layout import call_with, is_plain, out_in_view, why_not_adaptable, widest_float
from lora.untyped import after_load
from lora.updates import LowRankUpdate
from lora.vigil import Vigil


class Routing(Protocol):
    """What the updates of each row's own adapters add; see `lora.routing`."""

    def __call__(self, x: Tensor) -> Tensor:
        """Map `(B, …, in)` to `(B, …, out)`."""
        ...


class LoRALinear(Adapted):
    """A frozen linear layer with the updates of any number of adapters beside it.

    The base is the very module it replaces, and its weight is never written: a merged weight lives
    beside it and takes its place in the forward pass, so unmerging is forgetting.

    Args:
        base: an `nn.Linear`, an `nn.Embedding`, or a Conv1D that stores its weight `(in, out)`.

    Raises:
        ValueError: `base` is none of them.
    """

    fused = True
    """Whether the fast forms are taken where they apply; False is for comparing with them."""

    def __init__(self, base: nn.Module) -> None:
        if reason := why_not_adaptable(base):
            raise ValueError(f"{type(base).__name__} cannot carry an update: {reason}.")
        super().__init__(base)
        self.routing: Routing | None = None  # `lora.routed` writes
        self.vigil = Vigil()  # sees to it that backward runs under what forward ran under
        self.merged_weight: Tensor | None  # in the base's layout. `lora.merging` writes, as this:
        self.merged_bias: Tensor | None  # None where adapters train no bias
        self.register_buffer("merged_weight", None, persistent=False)
        self.register_buffer("merged_bias", None, persistent=False)
        after_load(self, _fold_again)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(…, in)` to `(…, out)`."""
        self.vigil.begin(self.enabled, self.merged_weight is None, self.active, self.routing)
        if not self.enabled:
            return self.base(x)
        if self.merged_weight is not None:
            return self._base_with(x, self.merged_weight, self.merged_bias)
        if self.routing is not None:
            y = plus(self.base(x), self.routing(x))
        elif not is_plain(self.base):
            y = self._own_forward(x)
        elif (fast := self._fast_forward(x)) is not None:
            y = fast
        else:
            y = self._base_with(x, None, self.trained_bias())
            for update, weight in self.active_updates():
                y = plus(y, update(x, weight))
        return self.vigil.over(y, self.updates)

    def _fast_forward(self, x: Tensor) -> Tensor | None:
        """The same by the wing, or None where that has no form for it."""
        if not self.fused or not forms.applies(x) or self.trained_bias() is not None:
            return None
        terms = [
            forms.Term(*update.factors(), weight * update.config.scaling, update.drop_rate)
            for update, weight in self.active_updates()
        ]
        return forms.linear(self.base, x, self.weight_out_in, terms)

    def _own_forward(self, x: Tensor) -> Tensor:
        """Where the base computes more than its class's formula: that, on the weight in force."""
        if any(update.drop_rate for update, _ in self.active_updates()) and x.is_floating_point():
            raise RuntimeError(
                f"{type(self.base).__name__} has a forward of its own, in which the input of an "
                "update cannot be dropped. Inject it with dropout=0, or exclude it."
            )
        return self._base_with(x, self.weight, self.trained_bias())

    def _base_with(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The base, with these in the place of its own where they are given."""
        given = {"weight": weight, "bias": bias}
        tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
        return call_with(self.base, tensors, x) if tensors else self.base(x)

    def update(self, adapter: str) -> LowRankUpdate:
        """The adapter's update of this layer."""
        return cast(LowRankUpdate, self.updates[adapter])

    def active_updates(self) -> Iterable[tuple[LowRankUpdate, float]]:
        """The updates in force, each with its weight in the sum."""
        return [(self.update(name), weight) for name, weight in self.active.items()]

    @property
    def weight(self) -> Tensor:
        """The weight in force, in the base's layout: whoever reads it computes the adapted layer.

        Raises:
            RuntimeError: the model is routed, so that each row has a weight of its own.
        """
        if self.routing is not None and self.enabled:
            raise RuntimeError("A routed layer has no one weight. Leave the lora.routed context.")
        if not self.enabled or (self.merged_weight is None and not self.active):
            return self.base.get_parameter("weight")
        return self.fold() if self.merged_weight is None else self.merged_weight

    @property
    def bias(self) -> Tensor | None:
        """The bias in force: the base's, or what the active adapters trained in its place."""
        trained = self.trained_bias() if self.enabled else None
        return cast(Tensor | None, getattr(self.base, "bias", None)) if trained is None else trained

    def trained_bias(self) -> Tensor | None:
        """`b + Σ w·(bᵢ - b)` of the active adapters that train a bias; None where none does."""
        trained = [(u.bias, w) for u, w in self.active_updates() if u.bias is not None]
        if len(trained) == 1 and trained[0][1] == 1:
            return trained[0][0]
        if not trained:
            return None
        bias = base = self.base.get_parameter("bias")
        for own, weight in trained:
            bias = bias + weight * (own - base)
        return bias

    @property
    def weight_out_in(self) -> Tensor:
        """The base's own weight seen as `(out, in)`, whatever its layout."""
        return out_in_view(self.base, self.base.get_parameter("weight"))

    def ideal(self) -> Tensor:
        """`W + Σ w·s·B A` of the active updates, `(out, in)`, in the widest float, unrounded."""
        ideal = self.weight_out_in.to(widest_float(self.weight_out_in.device))
        for update, weight in self.active_updates():
            ideal = ideal + weight * update.delta()
        return ideal

    def fold(self) -> Tensor:
        """The ideal weight, rounded once to the base's dtype, in the base's layout."""
        dtype = self.base.get_parameter("weight").dtype
        return out_in_view(self.base, self.ideal()).to(dtype).contiguous()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "routing": None, "vigil": Vigil()}


def plus(y: Tensor, u: Tensor) -> Tensor:
    """`y + u` in the dtype of `y`, but where u is zero y to the bit: -0.0 + 0.0 would be 0.0."""
    u = u.to(y.dtype)
    unchanged = y - (u.detach() - u)  # y - 0.0, through which u still learns
    return torch.where(u.detach() == 0, unchanged, y + u)


def _fold_again(layer: nn.Module, _: object) -> None:
    """After `load_state_dict` into a merged layer: fold what was loaded."""
    if isinstance(layer, LoRALinear) and layer.merged_weight is not None:
        layer.merged_weight, bias = layer.fold().detach(), layer.trained_bias()
        layer.merged_bias = None if bias is None else bias.detach()
