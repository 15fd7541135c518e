"""The loss of predicting each next token, with and without ever holding all logits.

Labels lie beside the token ids: `labels[b, t]` is the token at position t, or `IGNORE` where it is
not to be learnt; the shift by one happens here.

Shapes: B batch · T time · C n_embd · V vocab · N positions, flattened.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORE = -100
"""The label of a position that is not learnt."""

CHUNK = 2048  # positions whose logits are held at a time


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
        compile: run the body, and the loss of a chunk, through torch.compile. They stay apart,
            since one graph of both would hold the logits of all chunks at once.
    """
    targets = shifted(labels)
    if not (hasattr(model, "transformer") and hasattr(model, "lm_head")):
        logits = cast(Tensor, model(idx)).flatten(0, 1).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    head = cast(nn.Module, model.lm_head)
    run, chunk_loss = (_compiled(_run), _compiled(_chunk)) if compile else (_run, _chunk)
    hidden: Tensor = run(cast(nn.Module, model.transformer), idx)  # (N, C)
    if not hidden.is_cuda:  # a GPU would have to tell the host how many there are
        supervised = targets != IGNORE
        hidden, targets = hidden[supervised], targets[supervised]
    biased = getattr(head, "bias", None) is not None
    if type(head) is nn.Linear and not biased and not head.weight.requires_grad:
        return cast(Any, _FrozenHeadLoss).apply(hidden, head.weight, targets, chunk_loss)
    logits = head(hidden).float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def _run(transformer: nn.Module, idx: Tensor) -> Tensor:
    return transformer(idx).flatten(0, 1)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return cast(Any, torch).compile(function, dynamic=False)


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
        vocab = weight.shape[0]
        if weight.is_cuda:  # matrix products are slow on a side that is no multiple of 8
            weight = F.pad(weight, (0, 0, 0, -vocab % 64))
        total = hidden.new_zeros((), dtype=torch.float32)
        gradients: list[Tensor] = []
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            loss, gradient = chunk_loss(
                hidden[part], weight, targets[part], vocab, ctx.needs_input_grad[0]
            )
            total = total + loss
            gradients.append(gradient)
        ctx.save_for_backward(torch.cat(gradients) if gradients else hidden)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None, None


def _chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab: int, needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of some positions; rows of `weight` past `vocab` are padding."""
    logits = (hidden @ weight.t()).float()  # (N, V padded)
    tokens = torch.arange(len(weight), device=hidden.device)
    if len(weight) > vocab:
        logits = logits.masked_fill(tokens >= vocab, -torch.inf)
    supervised = targets != IGNORE
    wanted = targets.where(supervised, 0)[:, None]
    logits = logits - logits.amax(-1, keepdim=True)  # far from zero, float32 is coarse
    at_wanted = logits.gather(1, wanted)
    scores = logits.exp_()
    total = scores.sum(-1, keepdim=True)  # in pairs; a softmax kernel's running sum is off by 1e-5
    loss = (total.log() - at_wanted).squeeze(1).where(supervised, 0.0).sum()
    if not needs_gradient:
        return loss, hidden
    gradient = scores.div_(total).add_(tokens == wanted, alpha=-1)  # probabilities − 1 where right
    return loss, (gradient.to(weight.dtype) @ weight).to(hidden.dtype) * supervised[:, None]
