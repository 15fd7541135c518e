"""Causal attention with dropout, and of several documents that lie in one row.

Shapes: B batch · T time · N slots seen · H heads · D head size · S documents.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2.fast.devices import attends_apart, draws_one_by_one, tells_counts
from gpt2.fast.dropout import drop
from gpt2.fast.untyped import attend_apart, integers

Drops = Callable[[Tensor, float], Tensor]
"""Drops elements of a tensor with a probability, and scales the rest."""

TILE = 128  # tokens that a GPU's kernel looks at together: it looks in vain past a document's end


class Documents(NamedTuple):
    """The documents of one row: where each begins and the last ends, `(S + 1,)` int32.

    A tensor, so that rows of other documents need nothing compiled or captured anew.
    """

    starts: Tensor
    T: int
    longest: int  # none is longer

    @classmethod
    def of(cls, idx: Tensor, starts: Tensor | None, limit: int, cache: object) -> Self | None:
        """The documents of `idx` `(1, T)`, none longer than `limit`; None without starts.

        Raises:
            ValueError: another shape, or a cache; on a CPU, which can look, also starts that are
                not the row's.
        """
        if starts is None:
            return None
        if cache is not None:
            raise ValueError("A cache continues rows of one text: give it or documents, not both.")
        if idx.dim() != 2 or len(idx) != 1 or idx.is_floating_point() or starts.dim() != 1:
            raise ValueError(
                "Documents lie in one row: give idx (1, T) and documents (S + 1,), got "
                f"{tuple(idx.shape)} and {tuple(starts.shape)}."
            )
        T = idx.shape[1]
        if tells_counts(starts.device) and not torch.compiler.is_compiling():
            lengths = starts.diff()
            found = int(starts[0]), int(starts[-1]), int(lengths.min()), int(lengths.max())
            if found[:2] != (0, T) or found[2] < 0 or found[3] > limit:
                raise ValueError(
                    f"Documents must go from 0 to the row's {T} tokens, of 0 to {limit} each; they "
                    f"go from {found[0]} to {found[1]}, of {found[2]} to {found[3]} each."
                )
        return cls(starts.to(torch.int32), T, min(T, -(-limit // TILE) * TILE))

    def numbers(self) -> Tensor:
        """To which document each token belongs, `(T,)`, from 1."""
        places = torch.arange(self.T, dtype=torch.int32, device=self.starts.device)
        return torch.searchsorted(self.starts, places, right=True)

    def positions(self) -> Tensor:
        """The position of each token in its document, `(1, T)`."""
        places = torch.arange(self.T, device=self.starts.device)
        return (places - self.starts[self.numbers() - 1])[None]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | Documents | None,
    p: float,
    drops: Drops | None = None,
) -> Tensor:
    """`F.scaled_dot_product_attention`, causal unless `visible` says what each position sees.

    Args:
        q: `(B, H, T, D)`.
        k, v: `(B, H, N, D)`; without `visible` N is T.
        visible: added to the scores, `(B, 1, T, N)`; or the documents of the one row, of which a
            position sees its own.
        p: probability of dropping a weight of attention.
        drops: what drops them, if not torch.

    Returns:
        `(B, H, T, D)`.
    """
    if isinstance(visible, Documents):
        return _attend_apart(q, k, v, visible, p)
    if p and visible is None and (drops is not None or draws_one_by_one(q.device)):
        return _attend_in_parts(q, k, v, p, drops)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, dropout_p=p, is_causal=visible is None
    )


def _attend_apart(q: Tensor, k: Tensor, v: Tensor, documents: Documents, p: float) -> Tensor:
    """Each document alone: by one kernel, one after the other, or under a mask."""
    if not p and attends_apart(q.device, q.dtype):  # the kernel drops nothing
        return attend_apart(q, k, v, documents.starts, documents.longest)
    if tells_counts(q.device) and not torch.compiler.is_compiling():
        ends = pairwise(integers(documents.starts))
        parts = [slice(start, end) for start, end in ends if start < end]
        each = [attend(q[:, :, s], k[:, :, s], v[:, :, s], None, p) for s in parts]
        return torch.cat(each, 2)
    number = documents.numbers()
    visible = (number[:, None] == number).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=p)


def _attend_in_parts(q: Tensor, k: Tensor, v: Tensor, p: float, drops: Drops | None) -> Tensor:
    """What torch does too on a CPU, where it has no fused form for dropout, but for its draws."""
    T = q.shape[-2]
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, T, T)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return (drop(weights, p)[0] if drops is None else drops(weights, p)) @ v
