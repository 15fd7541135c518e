"""Causal attention with dropout, and of several documents that lie in one row.

Shapes: B batch · T time · N slots seen · H heads · D head size.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2.cache import Documents, Mask
from gpt2.fast.devices import on_cpu, on_cuda
from gpt2.fast.dropout import drop

Drops = Callable[[Tensor, float], Tensor]
"""Drops elements of a tensor with a probability, and scales the rest."""

TILE = 128  # tokens that a GPU's kernel reads together, past a document's end too


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, p: float, drops: Drops | None = None
) -> Tensor:
    """`F.scaled_dot_product_attention`, causal unless the mask says what each position sees.

    From `q` `(B, H, T, D)` and `k`, `v` `(B, H, N, D)` to `(B, H, T, D)`; its weights are dropped
    with the probability `p`, by `drops` if it is given.
    """
    if isinstance(mask, Documents):
        return _attend_within(q, k, v, mask, p)
    # A CPU's random numbers cost more than the attention whose weights they drop.
    if p and mask is None and (drops is not None or on_cpu(q.device)):
        return _attend_in_parts(q, k, v, p, drops)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=p, is_causal=mask is None
    )


def _attend_within(q: Tensor, k: Tensor, v: Tensor, documents: Documents, p: float) -> Tensor:
    """Each document alone: by one kernel, one after the other, or under a mask."""
    starts, T, longest = documents
    half = q.dtype in (torch.bfloat16, torch.float16)
    if not p and half and on_cuda(q.device):  # the kernel drops nothing
        from torch.nn.attention.varlen import varlen_attn  # it imports the compiler: a second

        most = min(T, -(-longest // TILE) * TILE)
        flat = [t[0].transpose(0, 1) for t in (q, k, v)]  # (T, H, D)
        run: Any = varlen_attn
        y = run(*flat, starts, starts, most, most, window_size=(-1, 0))
        return y.transpose(0, 1)[None]

    if on_cpu(q.device) and not torch.compiler.is_compiling():  # where the host may look
        parts = [slice(start, end) for start, end in pairwise(starts.tolist()) if start < end]
        each = [attend(q[:, :, s], k[:, :, s], v[:, :, s], None, p) for s in parts]
        return torch.cat(each, 2)

    number = documents.numbers()
    mask = (number[:, None] == number).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)


def _attend_in_parts(q: Tensor, k: Tensor, v: Tensor, p: float, drops: Drops | None) -> Tensor:
    """As torch does it on a CPU, where dropout has no fused form, but for the draws."""
    T = q.shape[-2]
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, T, T)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return (drop(weights, p)[0] if drops is None else drops(weights, p)) @ v
