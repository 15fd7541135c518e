"""A base layer under many adapters at once, and the one tensor that all their factors lie in.

Shapes: k slots · b rows of a slot · in, out · r rank, padded to the largest · P parameters of a
slot · … any axes between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn


class StackedLinear(nn.Module):
    """`y = x W + b + s_i · drop(x) A_iᵀ B_iᵀ` for the rows of each slot i, by batched products.

    Args:
        base: the frozen layer, which computes `x W + b`.
        a: `(k, r, in)`; where a slot's rank is smaller, the rest is zero and stays so.
        b: `(k, out, r)`, likewise.
        dropping: whether any slot may have dropout.

    Attributes:
        scales: `(k,)`, each slot's factor, zero at first.
        rates: `(k,)`, each slot's probability of dropping an input feature in training.

    `drops` drops a slot's input: from the tensor and the rates to the tensor. Who trains sets it;
    without it nothing is dropped.
    """

    drops: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, *, dropping: bool) -> None:
        super().__init__()
        self.base = base
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)
        self.scales, self.rates = a.new_zeros(2, len(a)).unbind()
        self.dropping, self.training = dropping, base.training

    def forward(self, x: Tensor) -> Tensor:
        """Map `(k·b, …, in)` to `(k·b, …, out)`.

        Raises:
            ValueError: the rows are not k equal blocks.
        """
        y, k = self.base(x), len(self.A)
        if x.shape[0] % k:
            raise ValueError(f"The batch has {x.shape[0]} rows, which are not {k} equal blocks.")
        drops = self.drops if self.training and self.dropping else None
        rows = x if drops is None else drops(x, self.rates)
        rows = rows.reshape(k, -1, x.shape[-1])
        h = rows @ self.A.to(x.dtype).mT  # (k, b·…, r)
        h = (h * self.scales[:, None, None].to(h.dtype)).to(y.dtype)
        stacked = y.reshape(k, -1, y.shape[-1])
        return torch.baddbmm(stacked, h, self.B.to(y.dtype).mT).view(y.shape)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        k, r, features = self.A.shape
        return f"slots={k}, r={r}, in={features}, out={self.B.shape[1]}"


class Stack:
    """Room for the factors of k adapters: a row each, the A's of all layers and then the B's.

    Args:
        slots: k.
        shapes: each layer's A and B, tensors of the largest shapes, by path.
        dtype, device: of the room.

    Attributes:
        flat, grad: `(k, P)`, parameters and room for gradients, zero at first.
        parts: the columns of the A's and of the B's.
    """

    def __init__(
        self,
        slots: int,
        shapes: Mapping[str, Sequence[Tensor]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._places: dict[str, list[tuple[int, torch.Size]]] = {path: [] for path in shapes}
        ends = [0]
        for which in (0, 1):
            for path, pair in shapes.items():
                self._places[path].append((ends[-1], pair[which].shape))
                ends.append(ends[-1] + pair[which].numel())
        middle, end = ends[len(shapes)], ends[-1]
        self.parts: Mapping[str, slice] = {"A": slice(0, middle), "B": slice(middle, end)}
        self.flat = torch.zeros(slots, end, dtype=dtype, device=device)
        self.grad = torch.zeros_like(self.flat)

    def of(self, rows: Tensor, path: str) -> list[Tensor]:
        """A layer's A and B, `(…, r, in)` and `(…, out, r)`, as views of rows `(…, P)`."""
        return [
            rows[..., start : start + shape.numel()].unflatten(-1, shape)
            for start, shape in self._places[path]
        ]
