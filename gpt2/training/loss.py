"""The loss of predicting each next token, with and without ever holding all logits.

Labels lie beside the token ids: `labels[b, t]` is the token at position t, or `IGNORE` where it is
not to be learnt; the shift by one happens here.

Shapes: B batch · T time · C n_embd · V vocab · N positions, flattened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2.fast.compiling import compiled
from gpt2.model import LMHead, Transformer

IGNORE = -100
"""The label of a position that is not learnt."""

# Positions whose logits are held at a time: on a CPU, as many as its last cache holds.
CHUNKS = {"cpu": 128, "cuda": 2048}


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy, in nats, over the supervised tokens.

    Args:
        logits: `(B, T, V)`, computed with in float32.
        labels: `(B, T)`, aligned with the token ids.

    Raises:
        ValueError: no token is supervised, or the shapes do not fit.
    """
    if logits.shape[:2] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} differ.")
    targets = shifted(labels)
    if not (targets != IGNORE).any():
        raise ValueError("No token is supervised: every label after the first position is IGNORE.")
    return F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORE)


def summed_loss(model: nn.Module, idx: Tensor, labels: Tensor, *, compile: bool = False) -> Tensor:
    """The cross-entropy summed over the supervised tokens, a float32 scalar.

    A GPT-2 (anything with a `transformer` and an `lm_head`) applies its head to the supervised
    positions only; with a frozen head its logits exist for a chunk of positions at a time. Any
    other model must map `idx` to logits.

    Args:
        model: a GPT-2, with adapters or without, or a module from `(B, T)` ids to logits.
        idx, labels: `(B, T)`.
        compile: run a GPT-2's blocks, and on a GPU the loss of a chunk, through torch.compile.
    """
    targets = shifted(labels)
    if not (hasattr(model, "transformer") and hasattr(model, "lm_head")):
        logits = cast(Tensor, model(idx)).flatten(0, 1).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    head, body = cast(nn.Module, model.lm_head), cast(nn.Module, model.transformer)
    compiling = {"compile": True} if compile and isinstance(body, Transformer) else {}
    hidden: Tensor = body(idx, **compiling).flatten(0, 1)  # (N, C)
    if not hidden.is_cuda:  # a GPU would have to tell the host how many there are
        supervised = targets != IGNORE
        hidden, targets = hidden[supervised], targets[supervised]
    plain = type(head) in (nn.Linear, LMHead) and getattr(head, "bias", None) is None
    if plain and not cast(Tensor, head.weight).requires_grad:
        chunk_loss = compiled(_chunk) if compile and hidden.is_cuda else _chunk
        return cast(Any, _FrozenHeadLoss).apply(hidden, head.weight, targets, chunk_loss)
    logits = head(hidden).float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def shifted(labels: Tensor) -> Tensor:
    """What each position is to predict, `(B·T,)`: the next label, nothing after the last."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()


class _FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy of `hidden Wᵀ`, summed; the gradient of `hidden` is made in the forward.

    The head's weight needs no gradient, so a chunk of logits can be dropped as soon as it has
    given its share of the loss and of the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_loss: Callable[..., Any]
    ) -> Tensor:
        n, vocab = len(hidden), weight.shape[0]
        if weight.is_cuda:  # matrix products are slow on a side that is no multiple of 8
            weight = F.pad(weight, (0, 0, 0, -vocab % 64))
        else:
            hidden = F.pad(hidden, (0, 0, 0, -n % 8))
            targets = F.pad(targets, (0, -n % 8), value=IGNORE)
        total = hidden.new_zeros((), dtype=torch.float32)
        gradients: list[Tensor] = []
        size = CHUNKS.get(hidden.device.type, max(CHUNKS.values()))
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            loss, gradient = chunk_loss(
                hidden[part], weight, targets[part], vocab, ctx.needs_input_grad[0]
            )
            total = total + loss
            gradients.append(gradient)
        ctx.save_for_backward(torch.cat(gradients)[:n] if gradients else hidden)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None, None


def _chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab: int, needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of some positions; rows of `weight` past `vocab` are padding."""
    logits = _times(hidden, weight).float()  # (N, V padded)
    if len(weight) > vocab:
        tokens = torch.arange(len(weight), device=hidden.device)
        logits = logits.masked_fill(tokens >= vocab, -torch.inf)
    supervised = targets != IGNORE
    wanted = targets.where(supervised, 0)[:, None]
    top = logits.amax(-1, keepdim=True)  # subtracted: far from zero, float32 is coarse
    at_wanted = logits.gather(1, wanted) - top
    scores = logits.sub_(top).exp_()
    total = scores.sum(-1, keepdim=True)  # in pairs; a softmax kernel's running sum is off by 1e-5
    loss = (total.log() - at_wanted).squeeze(1).where(supervised, 0.0).sum()
    if not needs_gradient:
        return loss, hidden
    probabilities = scores.div_(total).to(weight.dtype)
    less_one = (at_wanted.exp() / total - 1).to(weight.dtype)  # where the token is the right one
    gradient = _times(probabilities.scatter_(1, wanted, less_one), weight.t())
    return loss, gradient.to(hidden.dtype) * supervised[:, None]


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """`x Wᵀ`; MKL splits the transposed product better over a CPU's threads."""
    return (weight @ x.t()).t() if x.device.type == "cpu" else x @ weight.t()
