"""The formula as single differentiable functions: the fast forms of `LoRALinear`.

They keep the input once, and of dropout a byte an element. Second derivatives are right.

Shapes: N rows of the input, all leading axes flattened · in, out · r rank.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lora.fast.dropout import drop
from lora.layout import is_conv1d, is_hooked

FEW = 64  # rows up to which compiled inference writes the products as sums
_HOOKS = ("forward", "forward_pre", "backward", "backward_pre")
WIDE = 2048  # rows from which widening the weight by B pays


class Term(NamedTuple):
    """What one update adds: `scaling · drop(x) Aᵀ Bᵀ`."""

    a: Tensor  # (r, in), used in the dtype of the input
    b: Tensor  # (out, r), likewise
    scaling: float  # its weight in the sum included
    p: float  # probability of dropout in this call


def applies(layer: nn.Module, x: Tensor) -> bool:
    """Whether the forms apply: no ids, autocast, transform of torch.func, or moved weight."""
    device = x.device.type
    return (
        x.is_floating_point()
        and not is_hooked(layer)
        and not is_hooked(vars(layer)["base"])
        and not (device != "meta" and torch.is_autocast_enabled(device))
        and not in_transform()
    )


def in_transform() -> bool:
    """Whether torch.func transforms what runs now."""
    return torch._C._are_functorch_transforms_active()


def linear(base: nn.Module, x: Tensor, weight: Tensor, terms: Sequence[Term]) -> Tensor:
    """`base(x)` and the terms, for `x` `(…, in)` and the base's weight `(out, in)`."""
    if len(terms) == 1 and _widens(base, x, weight, terms[0]):
        return wide_linear(x, weight, cast(Tensor | None, base.bias), terms[0])
    y = base(x)
    for term in terms:
        y = add_update(y, x.to(y.dtype), term)
    return y


def add_update(y: Tensor, x: Tensor, term: Term) -> Tensor:
    """`y` `(…, out)` and the term for `x` `(…, in)`."""
    inferring = term.p == 0 and not torch.is_grad_enabled()
    if torch.compiler.is_compiling() and inferring and len(_rows(x)) <= FEW:
        return _add_in_one_kernel(y, x, term)
    return _AddUpdate.apply(y, x, *term)


def _add_in_one_kernel(y: Tensor, x: Tensor, term: Term) -> Tensor:
    """The products as sums, which a compiler fuses."""
    h = (_rows(x)[:, None] * term.a).sum(-1) * term.scaling  # (N, r), in A's dtype if wider
    return y + (h[:, None] * term.b).sum(-1).view(y.shape).to(y.dtype)


class _AddUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, p: float
    ) -> Tensor:
        h, keep = _down(x, a, p)
        ctx.save_for_backward(x, keep, h, a, b)
        ctx.scaling, ctx.p = scaling, p
        # The product is scaled, and no factor: zeros stay zeros.
        out = torch.addmm(_rows(y), h, b.to(x.dtype).t(), alpha=scaling)
        return torch.ops.aten._unsafe_view(out, y.shape)  # no view: it may be changed in place

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, keep, h, a, b = ctx.saved_tensors
        (dy,) = grad_outputs
        _, needs_x, needs_a, needs_b, *_ = ctx.needs_input_grad
        dh = (_rows(dy) @ b.to(dy.dtype)) * ctx.scaling
        dx = _masked(dh @ a.to(dh.dtype), keep, ctx.p).view(x.shape) if needs_x else None
        da = _grad_of_a(dh, x, keep, a, ctx.p) if needs_a else None
        db = _grad_of_b(dy, _again(h, x, keep, a, ctx.p), b, ctx.scaling) if needs_b else None
        return dy, dx, da, db, None, None


def _widens(base: nn.Module, x: Tensor, weight: Tensor, term: Term) -> bool:
    """Whether `wide_linear` computes the same here, and pays."""
    return (
        x.dtype == weight.dtype
        and (type(base) is nn.Linear or is_conv1d(base))
        # At birth inference is the base's to the bit.
        and term.a.requires_grad
        and pays_wide(x, len(term.a))
        and not any(getattr(base, f"_{name}_hooks") for name in _HOOKS)
        and not any(p.requires_grad for p in base.parameters())
    )


def pays_wide(x: Tensor, rank: int) -> bool:
    """Whether `wide_linear` pays: in a large, aligned training step on a GPU."""
    width = x.shape[-1] + rank
    return x.is_cuda and torch.is_grad_enabled() and len(_rows(x)) >= WIDE and width % 8 == 0


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None, term: Term) -> Tensor:
    """`x Wᵀ + bias` and the term, as one product `[x | h] [W | sB]ᵀ`."""
    return _WideLinear.apply(x, weight, bias, *term)


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
        h, keep = _down(x, a, p)
        wide, widened = torch.cat([_rows(x), h], 1), _widened(weight, b, scaling)
        y = wide @ widened if bias is None else torch.addmm(bias, wide, widened)
        ctx.save_for_backward(x, keep, h, weight, a, b)
        ctx.scaling, ctx.p = scaling, p
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], len(b)))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, keep, h, weight, a, b = ctx.saved_tensors
        (dy,) = grad_outputs
        needs_x, _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        dx: Tensor | None = None
        if needs_x:
            d = _rows(dy) @ _widened(weight, b, ctx.scaling).t()  # (N, in + r)
            through, dh = d[:, : x.shape[-1]], d[:, x.shape[-1] :]
            dx = (through + _masked(dh @ a.to(dh.dtype), keep, ctx.p)).view(x.shape)
        else:
            dh = _rows(dy) @ _scaled(b, ctx.scaling, dy.dtype)
        da = _grad_of_a(dh, x, keep, a, ctx.p) if needs_a else None
        db = _grad_of_b(dy, _again(h, x, keep, a, ctx.p), b, ctx.scaling) if needs_b else None
        return dx, None, None, da, db, None, None


def _down(x: Tensor, a: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    """`h = drop(x) Aᵀ` `(N, r)`, and what dropout kept, `(N, in)`."""
    rows = _rows(x)  # dropped instead of x: only so does torch.compile keep no mask
    dropped, keep = drop(rows, p) if p else (rows, None)
    return dropped @ a.to(x.dtype).t(), keep


def _again(h: Tensor, x: Tensor, keep: Tensor | None, a: Tensor, p: float) -> Tensor:
    if not torch.is_grad_enabled():
        return h
    return _masked(_rows(x), keep, p) @ a.to(x.dtype).t()


def _grad_of_a(dh: Tensor, x: Tensor, keep: Tensor | None, a: Tensor, p: float) -> Tensor:
    return (dh.t() @ _masked(_rows(x), keep, p)).to(a.dtype)


def _grad_of_b(dy: Tensor, h: Tensor, b: Tensor, scaling: float) -> Tensor:
    return (_rows(dy).t() @ h).to(b.dtype) * scaling


def _masked(x: Tensor, keep: Tensor | None, p: float) -> Tensor:
    """What dropout did to the input, done to `x`."""
    return x if keep is None else torch.where(keep, x * (1 / (1 - p)), 0)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.numel() // max(x.shape[-1], 1), x.shape[-1])


def _scaled(b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    return (b * scaling).to(dtype)


def _widened(weight: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`[W | sB]ᵀ`, `(in + r, out)`, in W's layout."""
    b = _scaled(b, scaling, weight.dtype)
    if weight.stride(0) == 1:  # a Conv1D's
        return torch.cat([weight.t(), b.t()])
    return torch.cat([weight, b], 1).t()
