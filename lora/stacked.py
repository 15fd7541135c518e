"""A base layer under many adapters at once: each block of the batch's rows under its own.

Shapes: k slots · b rows of a slot · in, out · r rank, padded to the largest · … any axes between.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class StackedLinear(nn.Module):
    """`y = x W + b + s_i · drop(x) A_iᵀ B_iᵀ` for the rows of each slot i, by batched products.

    Args:
        base: the frozen layer, which computes `x W + b`.
        a: `(k, r, in)`; where a slot's rank is smaller, the rest is zero and stays so.
        b: `(k, out, r)`, likewise.
        scales: `(k,)`, each slot's factor.
        rates: `(k,)`, each slot's probability of dropping an input feature in training.

    `drops` drops a slot's input: from the tensor and the rates to the tensor. Who trains sets it;
    without it nothing is dropped.
    """

    drops: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, scales: Tensor, rates: Tensor):
        super().__init__()
        self.base = base
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)
        self.scales, self.rates = scales, rates
        self.training = base.training

    def forward(self, x: Tensor) -> Tensor:
        """Map `(k·b, …, in)` to `(k·b, …, out)`.

        Raises:
            ValueError: the rows are not k equal blocks.
        """
        y, k = self.base(x), len(self.A)
        if x.shape[0] % k:
            raise ValueError(f"The batch has {x.shape[0]} rows, which are not {k} equal blocks.")
        dropping = self.training and self.drops is not None
        rows = self.drops(x, self.rates) if dropping and self.drops is not None else x
        rows = rows.reshape(k, -1, x.shape[-1])
        h = rows @ self.A.to(x.dtype).mT  # (k, b·…, r)
        h = (h * self.scales[:, None, None].to(h.dtype)).to(y.dtype)
        stacked = y.reshape(k, -1, y.shape[-1])
        return torch.baddbmm(stacked, h, self.B.to(y.dtype).mT).view(y.shape)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        k, r, features = self.A.shape
        return f"slots={k}, r={r}, in={features}, out={self.B.shape[1]}"
