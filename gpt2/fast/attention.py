"""Causal attention with dropout, where torch's own draws cost more than the attention itself.

Shapes: B batch · T time · S slots seen · H heads · D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2.fast.devices import draws_one_by_one
from gpt2.fast.dropout import drop


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, p: float) -> Tensor:
    """`F.scaled_dot_product_attention`, causal unless `visible` says what each position sees.

    Args:
        q: `(B, H, T, D)`.
        k, v: `(B, H, S, D)`; without `visible` S is T.
        visible: added to the scores, `(B, 1, T, S)`.
        p: probability of dropping a weight of attention.

    Returns:
        `(B, H, T, D)`.
    """
    if p and visible is None and draws_one_by_one(q.device):
        return _attend_on_cpu(q, k, v, p)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, dropout_p=p, is_causal=visible is None
    )


def _attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """What torch does too on a CPU, where it has no fused form for dropout, but for its draws."""
    T = q.shape[-2]
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, T, T)
    weights, _ = drop(scores.masked_fill(later, -torch.inf).softmax(-1), p)
    return weights @ v
