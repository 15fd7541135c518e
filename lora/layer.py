"""One adapted layer: `y = x W + b + s · drop(x) Aᵀ Bᵀ`, with `s = alpha / r`. Read this first.

`LowRankUpdate` is one adapter's share of the formula, `LoRALinear` the frozen base layer with its
updates beside it. Everything else in this package is bookkeeping around these two.

Shapes: in, out features of the base layer · r rank · … any leading axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.adapted import Adapted
from lora.config import UpdateConfig
from lora.fast import forms
from lora.fast.dropout import drop
from lora.layout import call_with, is_plain, out_in_view, why_not_adaptable, widest_float
from lora.untyped import after_load
from lora.vigil import Vigil


class LowRankUpdate(nn.Module):
    """`s · drop(x) Aᵀ Bᵀ`: A is `(r, in)`, B is `(out, r)`, whatever the base layer's layout.

    A and B are used in the dtype of `x`, so float32 factors beside a 16-bit base cost no 32-bit
    copy of the activations.

    Args:
        in_features, out_features: of the base layer.
        config: rank, alpha and dropout.
        dtype, device: of A and B.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: UpdateConfig,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.A = nn.Parameter(torch.empty(config.r, in_features, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(out_features, config.r, dtype=dtype, device=device))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw A from U(±1/√in), that is Kaiming-uniform with a = √5, and set B to zero.

        A is drawn in float32 on the CPU, so that a seed gives the same adapter on every device.
        """
        a = torch.empty(self.A.shape, dtype=torch.float32, device="cpu")
        self.A.copy_(nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator))
        self.B.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        """A `(r, in)` and B `(out, r)` as they stand in the formula."""
        return self.A, self.B

    @torch.no_grad()
    def set_factors(self, a: Tensor, b: Tensor) -> None:
        """Take over values of the shapes of `factors()`.

        Raises:
            ValueError: listing what does not fit: a shape, values that are not finite.
        """
        if faults := self.misfits(a, b):
            raise ValueError(", ".join(faults))
        self.A.copy_(a)
        self.B.copy_(b)

    def misfits(self, a: Tensor, b: Tensor) -> list[str]:
        """What keeps these from being values of `factors()`."""
        faults: list[str] = []
        for name, given, own in zip("AB", (a, b), self.factors(), strict=True):
            if given.shape != own.shape:
                shapes = tuple(given.shape), tuple(own.shape)
                faults.append("lora_{} is {}, this layer takes {}".format(name, *shapes))
            elif not given.is_floating_point():
                faults.append(f"lora_{name} is {given.dtype}, which holds no floats")
            elif not torch.isfinite(given.to(own.dtype)).all():  # as it will be, not as it comes
                faults.append(f"lora_{name} has NaN or infinite values in {own.dtype}")
        if self.A.is_meta:
            faults.append("the layer is on the meta device, which holds no values")
        return faults

    @property
    def drop_rate(self) -> float:
        """The probability of dropout in the mode that the update is in."""
        return self.config.dropout if self.training else 0.0

    def forward(self, x: Tensor, weight: float = 1.0) -> Tensor:
        """Map `(…, in)` to `(…, out)`, in the dtype of `x`: `weight` times the update."""
        a, b = self.factors()
        h = self.down(x, a)  # (…, r)
        return F.linear(h, (b * (weight * self.config.scaling)).to(h.dtype))

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """`drop(x) Aᵀ`, `(…, r)`."""
        if self.drop_rate:
            x, _ = drop(x, self.drop_rate)
        return F.linear(x, a.to(x.dtype))

    def delta(self) -> Tensor:
        """What the update adds to the weight: `s · B A`, `(out, in)`, in the widest float."""
        dtype = widest_float(self.A.device)
        a, b = self.factors()
        return b.to(dtype) @ a.to(dtype) * self.config.scaling

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        c = self.config
        return f"in={self.A.shape[1]}, out={self.B.shape[0]}, r={c.r}, alpha={c.alpha:g}"


class EmbeddingUpdate(LowRankUpdate):
    """The update of an `nn.Embedding`: its input is a token id, so `x Aᵀ` is a row of Aᵀ.

    Here A starts at zero and B is drawn, since a looked-up row of a small A would learn slowly.

    Args:
        in_features, out_features, config, dtype, device: as for `LowRankUpdate`.
        padding_idx: the id whose row the base never trains; the update does not either.

    Source: loralib's `Embedding`, which PEFT follows too.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: UpdateConfig,
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(in_features, out_features, config, dtype=dtype, device=device)
        self.padding_idx = padding_idx

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Set A to zero and draw B from a standard normal."""
        self.A.zero_()
        drawn = torch.randn(self.B.shape, generator=generator, dtype=torch.float32, device="cpu")
        self.B.copy_(drawn)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """The rows of Aᵀ that the token ids `x` `(…)` select, `(…, r)`."""
        return F.embedding(x, a.t(), self.padding_idx)


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
        self.merged_weight: Tensor | None  # in the base's layout. `lora.merging` writes
        self.register_buffer("merged_weight", None, persistent=False)
        after_load(self, _fold_again)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(…, in)` to `(…, out)`."""
        if self.pauses:
            return self.base(x)
        if self.merged_weight is not None:
            return call_with(self.base, {"weight": self.merged_weight}, x)
        self.vigil.begin(self.active, self.routing)
        if self.routing is not None:
            y = plus(self.base(x), self.routing(x))
        elif not is_plain(self.base):
            y = self._own_forward(x)
        elif (fast := self._fast_forward(x)) is not None:
            y = fast
        else:
            y = self.base(x)
            for update, weight in self.active_updates():
                y = plus(y, update(x, weight))
        return self.vigil.over(y, self.updates)

    def _fast_forward(self, x: Tensor) -> Tensor | None:
        """The same by the wing, or None where that has no form for it."""
        if not self.fused or not forms.applies(x):
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
        return call_with(self.base, {"weight": self.weight}, x)

    def active_updates(self) -> Iterable[tuple[LowRankUpdate, float]]:
        """The updates in force, each with its weight in the sum."""
        return [(cast(LowRankUpdate, self.updates[n]), w) for n, w in self.active.items()]

    @property
    def weight(self) -> Tensor:
        """The weight in force, in the base's layout: whoever reads it computes the adapted layer.

        Raises:
            RuntimeError: the model is routed, so that each row has a weight of its own.
        """
        if self.routing is not None and not self.pauses:
            raise RuntimeError("A routed layer has no one weight. Leave the lora.routed context.")
        if self.pauses or (self.merged_weight is None and not self.active):
            return self.base.get_parameter("weight")
        return self.fold() if self.merged_weight is None else self.merged_weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return cast(Tensor | None, getattr(self.base, "bias", None))

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
        layer.merged_weight = layer.fold().detach()
