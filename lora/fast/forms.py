"""The formula as single differentiable functions: the fast path of `LoRALinear`.

They keep the input once, in its own dtype, and of dropout a byte an element at most. `add_update`
serves any base layer; in large steps on a GPU `wide_linear` computes base and update in the same
matrix products. `LoRALinear.forward` spells out what both compute.

Shapes: N rows of the input, all leading axes flattened · in, out · r rank.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from lora.fast.dropout import drop

FEW = 64  # rows up to which compiled inference writes the products as sums
WIDE = 2048  # rows from which widening the weight by B costs less than products of B's own


def add_update(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, p: float) -> Tensor:
    """`y + scaling · drop(x) Aᵀ Bᵀ`, differentiable once in y, x, A and B.

    Args:
        y: `(…, out)`.
        x: `(…, in)`, of y's dtype.
        a, b: `(r, in)` and `(out, r)`, used in the dtype of `x`.
        scaling: factor of the update.
        p: probability of dropout in [0, 1), for this call.
    """
    inferring = p == 0 and not torch.is_grad_enabled()
    if torch.compiler.is_compiling() and inferring and len(_rows(x)) <= FEW:
        return _add_update_in_one_kernel(y, x, a, b, scaling)
    return cast(Any, _AddUpdate).apply(y, x, a, b, scaling, p)


def _add_update_in_one_kernel(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The products as sums, which a compiler fuses with what is around them.

    On few rows, starting a kernel takes longer than running it.
    """
    h = (_rows(x)[:, None] * a).sum(-1) * scaling  # (N, r), in the dtype of A if that is wider
    return y + (h[:, None] * b).sum(-1).view(y.shape).to(y.dtype)


class _AddUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, p: float
    ) -> Tensor:
        rows, keep, h = _down(x, a, scaling, p)
        ctx.save_for_backward(rows, keep, h, a, b)
        ctx.scaling, ctx.p = scaling, p
        return torch.addmm(_rows(y), h, b.to(x.dtype).t()).view(y.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, keep, h, a, b = ctx.saved_tensors
        (dy,) = grad_outputs
        flat = _rows(dy)  # (N, out)
        dh = (flat @ b.to(dy.dtype)) * ctx.scaling
        da, dx = _up(dh, rows, keep, a, ctx.p, ctx.needs_input_grad[1])
        db = (flat.t() @ h).to(b.dtype)
        return dy, None if dx is None else dx.view(*dy.shape[:-1], -1), da, db, None, None


def pays_wide(x: Tensor, rank: int) -> bool:
    """Whether `wide_linear` is worth it: in a large training step on a GPU, if well aligned."""
    width = x.shape[-1] + rank
    return x.is_cuda and torch.is_grad_enabled() and len(_rows(x)) >= WIDE and width % 8 == 0


def wide_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, p: float
) -> Tensor:
    """`x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ` as one product `[x | h] [W | B]ᵀ`.

    Args:
        x: `(…, in)`, in the dtype of `weight`.
        weight, bias: `(out, in)`, of any strides, and `(out,)`, both frozen.
        a, b, scaling, p: as for `add_update`.
    """
    return cast(Any, _WideLinear).apply(x, weight, bias, a, b, scaling, p)


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        p: float,
    ) -> Tensor:
        rows, keep, h = _down(x, a, scaling, p)
        wide, widened = torch.cat([rows, h], 1), _widened(weight, b)
        y = wide @ widened if bias is None else torch.addmm(bias, wide, widened)
        ctx.save_for_backward(rows, keep, h, weight, a, b)
        ctx.scaling, ctx.p = scaling, p
        return y.view(*x.shape[:-1], len(b))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, keep, h, weight, a, b = ctx.saved_tensors
        flat = _rows(grad_outputs[0])  # (N, out)
        dx: Tensor | None = None
        if ctx.needs_input_grad[0]:
            d = flat @ _widened(weight, b).t()  # (N, in + r)
            dx, dh = d[:, : rows.shape[1]], d[:, rows.shape[1] :] * ctx.scaling
        else:
            dh = (flat @ b.to(flat.dtype)) * ctx.scaling
        da, through = _up(dh, rows, keep, a, ctx.p, dx is not None)
        if dx is not None and through is not None:
            dx = (dx + through).view(*grad_outputs[0].shape[:-1], -1)
        return dx, None, None, da, (flat.t() @ h).to(b.dtype), None, None


def _down(x: Tensor, a: Tensor, scaling: float, p: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """The input's rows `(N, in)`, what dropout kept of them, and `h = scaling · drop(x) Aᵀ`."""
    rows = _rows(x)
    dropped, keep = drop(rows, p) if p else (rows, None)
    return rows, keep, (dropped @ a.to(x.dtype).t()) * scaling


def _up(
    dh: Tensor, rows: Tensor, keep: Tensor | None, a: Tensor, p: float, needs_dx: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of A and of the input from that of `drop(x) Aᵀ`, `(N, r)`."""
    da = dh.t() @ _masked(rows, keep, p)
    dx = _masked(dh @ a.to(dh.dtype), keep, p) if needs_dx else None
    return da.to(a.dtype), dx


def _masked(x: Tensor, keep: Tensor | None, p: float) -> Tensor:
    """What dropout did to the input, done to `x`."""
    return x if keep is None else torch.where(keep, x * (1 / (1 - p)), 0)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.numel() // x.shape[-1], x.shape[-1])


def _widened(weight: Tensor, b: Tensor) -> Tensor:
    """`[W | B]ᵀ`, `(in + r, out)`, copied along W's own layout."""
    b = b.to(weight.dtype)
    if weight.stride(0) == 1:  # a Conv1D's
        return torch.cat([weight.t(), b.t()])
    return torch.cat([weight, b], 1).t()
