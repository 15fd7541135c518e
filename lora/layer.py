"""One adapted layer: `y = x W + b + s · drop(x) Aᵀ Bᵀ`, with `s = alpha / r`. Read this first.

`LowRankUpdate` is one adapter's share of the formula, `LoRALinear` the frozen base layer with its
updates beside it. Everything else in this package is bookkeeping around these two.

Shapes: in, out features of the base layer · r rank · … any leading axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call  # pyright: ignore[reportUnknownVariableType]
from torch.nn import functional as F

from lora.config import UpdateConfig
from lora.fast.dropout import drop
from lora.fast.forms import add_update, pays_wide, wide_linear
from lora.layout import is_conv1d, out_in_view, why_not_adaptable, widest_float


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

    @property
    def drop_rate(self) -> float:
        """The probability of dropout in the mode that the update is in."""
        return self.config.dropout if self.training else 0.0

    def plain_config(self) -> UpdateConfig:
        """The config that goes with `factors()`."""
        return self.config

    def misfits(self, a: Tensor, b: Tensor) -> list[str]:
        """What keeps these from being values of `factors()`."""
        faults: list[str] = []
        for name, given, own in zip("AB", (a, b), self.factors(), strict=True):
            if given.shape != own.shape:
                shapes = tuple(given.shape), tuple(own.shape)
                faults.append("lora_{} is {}, this layer takes {}".format(name, *shapes))
            elif not torch.isfinite(given).all():
                faults.append(f"lora_{name} has NaN or infinite values")
        if self.A.is_meta:
            faults.append("the layer is on the meta device, which holds no values")
        return faults

    @torch.no_grad()
    def set_factors(self, a: Tensor, b: Tensor) -> None:
        """Take over values of the shapes of `factors()`."""
        self.A.copy_(a)
        self.B.copy_(b)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """`drop(x) Aᵀ`, `(…, r)`."""
        if self.drop_rate:
            x, _ = drop(x, self.drop_rate)
        return F.linear(x, a.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(…, in)` to `(…, out)`, in the dtype of `x`."""
        a, b = self.factors()
        h = self.down(x, a) * self.config.scaling
        return F.linear(h, b.to(h.dtype))

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

    Source: loralib's `Embedding`, which PEFT follows too.
    """

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Set A to zero and draw B from a standard normal."""
        self.A.zero_()
        self.B.copy_(torch.randn(self.B.shape, generator=generator))

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """The rows of Aᵀ that the token ids `x` `(…)` select, `(…, r)`."""
        return F.embedding(x, a.t())


class LoRALinear(nn.Module):
    """A frozen linear layer with the updates of any number of adapters beside it.

    The base is the very module it replaces, and its weight is never written: a merged weight lives
    beside it and takes its place in the forward pass, so unmerging is forgetting.

    Args:
        base: an `nn.Linear`, an `nn.Embedding`, or a Conv1D that stores its weight `(in, out)`.

    Raises:
        ValueError: `base` is none of them.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        if reason := why_not_adaptable(base):
            raise ValueError(f"{type(base).__name__} cannot carry an update: {reason}.")
        self.base = base
        self.updates = nn.ModuleDict()  # adapter name -> LowRankUpdate
        self.active: dict[str, float] = {}  # adapter name -> its weight in the sum
        self.enabled = True
        # Take the fast path where it applies: once differentiable, the same to rounding.
        self.fused = True
        self.routing: Callable[[Tensor], Tensor] | None = None  # set by `lora.routed`
        # Base parameters that were trainable before injection; one list for the whole model.
        self.thawed: list[nn.Parameter] = []
        self.tied: list[nn.Parameter] = []  # the shared weight that this layer had, if untied
        self.merged_weight: Tensor | None  # in the base's layout; None when not merged
        self.register_buffer("merged_weight", None, persistent=False)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(…, in)` to `(…, out)`."""
        if not self.enabled:
            return self.base(x)
        if self.merged_weight is not None:
            return functional_call(self.base, {"weight": self.merged_weight}, (x,))
        if self.routing is not None:
            y = self.base(x)
            return y + self.routing(x).to(y.dtype)
        if self.fused and self._can_widen(x):
            return self._wide_forward(x)
        y = self.base(x)
        for update, weight in self.active_updates():
            if self.fused and _can_fuse(x, y):
                a, b = update.factors()
                y = add_update(y, x, a, b, weight * update.config.scaling, update.drop_rate)
            else:
                u = update(x).to(y.dtype)  # an embedding has no input dtype to follow
                y = y + (u if weight == 1 else weight * u)
        return y

    def _can_widen(self, x: Tensor) -> bool:
        """Whether `wide_linear` computes here what `forward` says, and pays."""
        base = self.base
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return (
            (type(base) is nn.Linear or is_conv1d(base))
            and len(self.active) == 1
            and not any(vars(base)[name] for name in hooks)
            and not any(p.requires_grad for p in base.parameters())
            and _can_fuse(x, self.weight_out_in)
            and all(
                # A frozen update is inference, which at birth is the base's to the bit.
                update.A.requires_grad and pays_wide(x, update.plain_config().r)
                for update, _ in self.active_updates()
            )
        )

    def _wide_forward(self, x: Tensor) -> Tensor:
        ((update, weight),) = self.active_updates()
        scaling = weight * update.config.scaling
        bias = cast(Tensor | None, self.base.bias)
        a, b = update.factors()
        return wide_linear(x, self.weight_out_in, bias, a, b, scaling, update.drop_rate)

    def active_updates(self) -> Iterable[tuple[LowRankUpdate, float]]:
        """The updates in force, each with its weight in the sum."""
        return [(cast(LowRankUpdate, self.updates[n]), w) for n, w in self.active.items()]

    def activate(self, weights: Mapping[str, float]) -> None:
        """Put those of the named updates that this layer has in force; only they require grad."""
        for name in self.active:
            self.updates[name].requires_grad_(False)
        # In the order of names: the sum is then the same bits however the mixture was written.
        self.active = {n: weights[n] for n in sorted(weights) if n in self.updates}
        for name in self.active:
            self.updates[name].requires_grad_(True)

    def untie(self, weight: nn.Parameter) -> None:
        """Give the base this weight of its own instead of the one that it shares."""
        self.tied.append(self.base.get_parameter("weight"))
        self.base.weight = weight

    def retie(self) -> None:
        """Undo `untie`."""
        if self.tied:
            self.base.weight = self.tied.pop()

    @property
    def weight_out_in(self) -> Tensor:
        """The base's own weight seen as `(out, in)`, whatever its layout."""
        return out_in_view(self.base, cast(Tensor, self.base.weight))


def _can_fuse(x: Tensor, y: Tensor) -> bool:
    """Whether the fast path takes this input, for an output like `y`: not ids, not autocast."""
    device = x.device.type
    return x.dtype == y.dtype and not (device != "meta" and torch.is_autocast_enabled(device))
