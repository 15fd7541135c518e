"""One adapted layer: `y = x W + b + s · drop(x) Aᵀ Bᵀ`, with `s = alpha / r`. Read this first.

`LoRALinear` is the frozen base layer with the updates of any number of adapters beside it;
`LowRankUpdate` is one adapter's `s · drop(x) Aᵀ Bᵀ`. Seven forms, which tests hold equal:

    LowRankUpdate.forward        as written above: for embeddings, autocast, torch.func
    LoRALinear.weight            `W + s·B A` in the base's dtype, for who reads it
    LoRALinear.ideal             the same in the widest float, for merging
    fast.forms.add_update        one differentiable function that keeps little: most calls
    fast.forms.wide_linear       base and update in one product: large steps on a GPU
    routing.BankRouting          each row of a batch under adapters of its choice
    population.StackedLinear     each block of rows under one of k adapters

Shapes: in, out features of the base layer · r rank · … any leading axes.
"""

import copy
import math
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.config import UpdateConfig
from lora.fast import forms
from lora.fast.dropout import drop
from lora.layout import gain_of, is_hooked, out_in_view, why_not_adaptable, widest_float


class LowRankUpdate(nn.Module):
    """`s · drop(x) Aᵀ Bᵀ`: A is `(r, in)`, B is `(out, r)`, both used in the dtype of `x`.

    Args:
        in_features, out_features: of the base layer.
        config: rank, alpha and dropout.
        dtype, device: of A and B.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
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
        """Draw A from U(±1/√in), which is Kaiming's with a = √5, and set B to zero."""
        # In float32 on the CPU: a seed gives the same adapter on every device.
        a = torch.empty(self.A.shape, dtype=torch.float32, device="cpu")
        self.A.copy_(nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator))
        self.B.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        """A `(r, in)` and B `(out, r)` as they stand in the formula."""
        return self.A, self.B

    @torch.no_grad()
    def set_factors(self, a: Tensor, b: Tensor) -> None:
        """Copy values of the shapes of `factors()`."""
        self.A.copy_(a)
        self.B.copy_(b)

    @property
    def drop_rate(self) -> float:
        """The probability of dropout in the mode that the update is in."""
        return self.config.dropout if self.training else 0.0

    def forward(self, x: Tensor, weight: float = 1.0) -> Tensor:
        """Map `(…, in)` to `(…, out)`, in the dtype of `x`: `weight` times the update."""
        a, b = self.factors()
        h = self.down(x, a)  # (…, r)
        return F.linear(h, (b * (weight * self.config.scaling)).to(h))

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """`drop(x) Aᵀ`, `(…, r)`."""
        if self.drop_rate:
            x, _ = drop(x, self.drop_rate)
        return F.linear(x, a.to(x))

    def delta(self) -> Tensor:
        """What the update adds to the weight: `s · B A`, `(out, in)`."""
        a, b = (factor.to(widest_float(factor.device)) for factor in self.factors())
        return b @ a * self.config.scaling

    def extra_repr(self) -> str:
        c = self.config
        return f"in={self.A.shape[1]}, out={self.B.shape[0]}, r={c.r}, alpha={c.alpha:g}"


class EmbeddingUpdate(LowRankUpdate):
    """The update of an `nn.Embedding`: its input is a token id, so `x Aᵀ` is a row of Aᵀ."""

    padding_idx: int | None = None  # whose row never trains

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Set A to zero and draw B from a standard normal, as loralib and PEFT do."""
        self.A.zero_()
        b = torch.randn(self.B.shape, generator=generator, dtype=torch.float32, device="cpu")
        self.B.copy_(b)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """The rows of Aᵀ that the token ids `x` `(…)` select, `(…, r)`."""
        return F.embedding(x, a.t().to(x.device), self.padding_idx)


class Adapted(nn.Module):
    """A frozen base module, and beside it what any number of adapters add.

    The base is no child: its parameters are registered here in its own dictionaries, so that
    whoever replaces one (`functional_call`, `fully_shard`) replaces the base's.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        shared = ("_parameters", "_buffers", "_non_persistent_buffers_set")
        vars(self).update({name: vars(base)[name] for name in shared}, base=base)
        self.base: nn.Module
        for name, child in base.named_children():
            self.register_module(name, child)
        self.updates = nn.ModuleDict()  # by the adapter's name
        self.active: Mapping[str, float] = {}  # by name: the weight in the sum. `activate` writes
        self.resting: dict[str, list[str]] = {}  # what trains again. `train_only` writes
        self.pauses = 0  # open contexts of `lora.disabled`, which writes
        self.train(base.training)

    @property
    def enabled(self) -> bool:
        """Whether no context of `lora.disabled` is open."""
        return not self.pauses

    def activate(self, weights: Mapping[str, float]) -> None:
        """Put those of the named adapters that this module has in force."""
        # In the order of names: the same bits however the mixture was written.
        self.active = {name: weights[name] for name in sorted(weights) if name in self.updates}

    def train_only(self, names: Collection[str]) -> None:
        """Freeze all other adapters; these train again, but for what a user froze."""
        for name, update in self.updates.items():
            if name in names:
                for key in self.resting.pop(name, ()):
                    update.get_parameter(key).requires_grad_(True)
            elif name not in self.resting:
                self.resting[name] = [k for k, p in update.named_parameters() if p.requires_grad]
                update.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        self.base.training = mode
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "pauses": 0}  # a copy is outside of contexts


class LoRALinear(Adapted):
    """A frozen linear layer with the updates of any number of adapters beside it.

    Args:
        base: an `nn.Linear`, an `nn.Embedding`, or a Conv1D that stores its weight `(in, out)`.

    Raises:
        ValueError: `base` is none of them, or computes something else than their formula.
    """

    fused = True  # whether the fast forms are taken where they apply

    def __init__(self, base: nn.Module) -> None:
        if reason := why_not_adaptable(base):
            raise ValueError(f"{type(base).__name__} cannot carry an update: {reason}.")
        super().__init__(base)
        self.gain = gain_of(base)  # base(x) is so many times its class's formula
        self.routing: Any = None  # a routing.BankRouting. `lora.routed` writes
        self.merged: nn.Module | None = None  # the base's double with a folded weight
        for name in ("in_features", "out_features", "num_embeddings", "embedding_dim", "slices"):
            if hasattr(base, name):
                setattr(self, name, getattr(base, name))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(…, in)` to `(…, out)`."""
        if not self.enabled:
            return self.base(x)
        if self.merged is not None:
            return self.merged(x)
        if self.routing is not None:
            y = self.base(x)
            y = y + self.routing(x).to(y)
        elif self.fused and forms.applies(self, x):
            y = forms.linear(self.base, x, self.weight_out_in, self.terms())
        else:
            y = self.base(x)
            for update, weight in self.active_updates():
                y = y + update(x, self.gain * weight).to(y)
        return _watched(y, self)

    def merge(self, weight: Tensor | None) -> None:
        """Compute with this weight, in the base's layout, and no update; None goes back."""
        double = None
        if weight is not None:
            double, merged = copy.copy(self.base), nn.Parameter(weight, requires_grad=False)
            vars(double)["_parameters"] = {**self._parameters, "weight": merged}
        vars(self)["merged"] = double  # no child, as the base is none

    def update(self, adapter: str) -> LowRankUpdate:
        """The adapter's update."""
        return cast(LowRankUpdate, self.updates[adapter])

    def active_updates(self) -> list[tuple[LowRankUpdate, float]]:
        """The updates in force, each with its weight in the sum."""
        return [(self.update(name), weight) for name, weight in self.active.items()]

    def terms(self) -> list[forms.Term]:
        """The updates in force as the fast forms take them."""
        return [
            forms.Term(*u.factors(), self.gain * weight * u.config.scaling, u.drop_rate)
            for u, weight in self.active_updates()
        ]

    @property
    def weight(self) -> Tensor:
        """The weight in force, in the base's layout and dtype, computed at each reading.

        Raises:
            RuntimeError: the model is routed, so that each row has a weight of its own.
        """
        base = cast(Tensor, self._parameters["weight"])
        if not self.enabled or base.is_meta or is_hooked(self) or hasattr(base, "full_tensor"):
            return base  # also what accelerate and fully_shard have under this name
        if self.routing is not None:
            raise RuntimeError("A routed layer has no one weight. Leave the lora.routed context.")
        if self.merged is not None:
            return self.merged.get_parameter("weight")
        if not self.active:
            return base
        weight = self.weight_out_in
        for update, share in self.active_updates():
            a, b = (factor.to(weight) for factor in update.factors())
            weight = torch.addmm(weight, b, a, alpha=share * update.config.scaling)
        return out_in_view(self.base, weight)

    @property
    def weight_out_in(self) -> Tensor:
        """The base's own weight seen as `(out, in)`, whatever its layout."""
        return out_in_view(self.base, cast(Tensor, self._parameters["weight"]))

    def ideal(self) -> Tensor:
        """`W + Σ w·s·B A` of the active updates, `(out, in)`, in the widest float, unrounded."""
        ideal = self.weight_out_in.to(widest_float(self.weight_out_in.device))
        for update, weight in self.active_updates():
            ideal = ideal + weight * update.delta()
        return ideal

    def extra_repr(self) -> str:
        return f"base={self.base!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "routing": None}

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        if self.merged is not None:  # its weight would be stale
            raise RuntimeError("The model is merged. Call lora.unmerge before load_state_dict.")
        super()._load_from_state_dict(*arguments, **named)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.merged is not None:
            self.merged._apply(fn)
        return self


def _watched(y: Tensor, layer: LoRALinear) -> Tensor:
    """`y`, whose backward pass raises where an adapter was switched off."""
    if not y.requires_grad or torch.compiler.is_compiling() or forms.in_transform():
        return y
    state: Any = layer.active if layer.routing is None else layer.routing.rows
    names = layer.active if layer.routing is None else layer.updates
    trained = [p for n in names for p in layer.updates[n].parameters() if p.requires_grad]
    return _Watch.apply(y, zlib.crc32(repr(state).encode()), trained) if trained else y


class _Watch(torch.autograd.Function):
    """The identity, whose backward pass raises where a factor trains no more."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, state: int, trained: list[nn.Parameter]) -> Tensor:
        # Where a checkpointed layer runs again, torch compares the shapes of what was saved.
        ctx.save_for_backward(y.new_empty(state, 0))
        ctx.trained = trained
        return torch.ops.aten._unsafe_view(y, y.shape)  # no view: it may be changed in place

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if not all(p.requires_grad for p in ctx.trained):
            raise RuntimeError(
                "An adapter was switched off after the loss. Call backward before lora.activate."
            )
        return grad_outputs[0], None, None


def why_not_usable(tensor: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """What keeps these from being values of a factor of this dtype, or None."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        return f"is {tensor.dtype}, which is no float of 16 bits or more"
    if not torch.isfinite(tensor.to(dtype)).all():
        return f"has NaN or infinite values in {dtype or tensor.dtype}"
    return None
