"""The formula for one update as a single differentiable function: the fast path of `LoRALinear`.

It keeps the input once, in its own dtype, and dropout as one byte an element; and the update is
added inside the matrix products instead of in a pass of its own. `LoRALinear.forward` spells out
what it computes.

Shapes: N rows of the input, all leading axes flattened · in, out · r rank.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

WIDE = 2048  # rows from which widening the weight by B costs less than a product of B's own


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dropout: float,
) -> Tensor:
    """`x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ`, differentiable once in x, A and B.

    Args:
        x: `(…, in)`, in the dtype of `weight`.
        weight: `(out, in)`, frozen, of any strides.
        bias: `(out,)`, frozen.
        a, b: `(r, in)` and `(out, r)`, used in the dtype of `x`.
        scaling: factor of the update.
        dropout: probability in [0, 1), for this call.

    Returns:
        `(…, out)`.
    """
    # Only a training step takes the wide sum: at birth inference is the base's to the bit.
    wide = torch.is_grad_enabled() and b.requires_grad and _pays(x, b)
    return cast(Any, _FusedLinear).apply(x, weight, bias, a, b, scaling, dropout, wide)


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        dropout: float,
        wide: bool,
    ) -> Tensor:
        rows = x.reshape(x.numel() // x.shape[-1], x.shape[-1])  # (N, in)
        dropped, mask = (rows, None) if not dropout else _drop(rows, dropout)
        h = (dropped @ a.to(x.dtype).t()) * scaling  # (N, r)
        b = b.to(x.dtype)
        if wide:
            y = _affine(bias, torch.cat([rows, h], 1), _widened(weight, b))
        else:
            y = _affine(bias, rows, weight.t()).addmm_(h, b.t())
        ctx.save_for_backward(rows, mask, h, weight, a, b)
        ctx.scaling, ctx.dropout, ctx.wide = scaling, dropout, wide
        return y.view(*x.shape[:-1], len(b))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        mask: Tensor | None
        rows, mask, h, weight, a, b = ctx.saved_tensors
        dy = grad_outputs[0].reshape(-1, b.shape[0])  # (N, out)
        dx: Tensor | None = None
        if ctx.needs_input_grad[0] and ctx.wide:
            d = dy @ _widened(weight, b).t()  # (N, in + r)
            dx, dh = d[:, : rows.shape[1]], d[:, rows.shape[1] :]
        else:
            dx, dh = dy @ weight if ctx.needs_input_grad[0] else None, dy @ b
        dh = dh * ctx.scaling  # (N, r)
        kept = None if mask is None else mask.to(dy.dtype) * (1 / (1 - ctx.dropout))
        da = dh.t() @ (rows if kept is None else rows * kept)
        db = dy.t() @ h
        if dx is not None:
            through = dh @ a.to(dh.dtype)
            whole: Tensor = dx + (through if kept is None else through * kept)
            dx = whole.view(*grad_outputs[0].shape[:-1], rows.shape[1])
        return dx, None, None, da.to(a.dtype), db.to(a.dtype), None, None, None


def _drop(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """`drop(x)`, and which elements it kept."""
    return cast(Any, torch).native_dropout(x, p, True)


def _affine(bias: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def _pays(x: Tensor, b: Tensor) -> bool:
    """Whether `[x | h] [W | B]ᵀ` as one product is worth it: large on a GPU, and well aligned."""
    rows, width = x.numel() // x.shape[-1], x.shape[-1] + b.shape[1]
    return x.is_cuda and rows >= WIDE and width % 8 == 0


def _widened(weight: Tensor, b: Tensor) -> Tensor:
    """`[W | B]ᵀ`, `(in + r, out)`, copied along W's own layout."""
    if weight.stride(0) == 1:  # a Conv1D's
        return torch.cat([weight.t(), b.t()])
    return torch.cat([weight, b], 1).t()
