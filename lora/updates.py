"""One adapter's share of a layer: `s · drop(x) Aᵀ Bᵀ`, with `s = alpha / r`; see `lora.layer`.

Shapes: in, out features of the base layer · r rank · … any leading axes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.config import UpdateConfig
from lora.fast.dropout import drop
from lora.layout import widest_float
from lora.values import why_not_usable


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
        # What the adapter trains in the place of the layer's bias, if it trains that.
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)

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
            elif reason := why_not_usable(given, own.dtype):
                faults.append(f"lora_{name} {reason}")
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
