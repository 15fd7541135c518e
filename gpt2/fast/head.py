"""The loss from hidden states, in a form that never holds all logits.

It is taken where the head computes `x Wᵀ` and nothing else; elsewhere the head is called.

Shapes: B batch · T time · C n_embd · V vocab · N positions, flattened.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2.fast import devices
from gpt2.fast.compiling import compiled
from gpt2.fast.products import linear
from gpt2.loss import IGNORE, cross_entropies, shifted, summed, wide_enough

CACHED = 2**21  # elements of a slice of the head's weight and of its logits, in a CPU's cache


def summed_loss(
    head: nn.Module, x: Tensor, labels: Tensor, *, compiling: bool, smoothing: float = 0.0
) -> Tensor:
    """`summed(head(x), labels)` of states `(B, T, C)`, the head at supervised positions only.

    A head's logits exist for a chunk of positions at a time where it takes no gradient;
    `compiling` runs a chunk through torch.compile, on a GPU.
    """
    if torch._C._are_functorch_transforms_active():  # torch.func sees the formula itself
        return summed(head(x), labels, smoothing)
    hidden, targets = x.flatten(0, 1), shifted(labels)  # (N, C) and (N,)
    if devices.on_cpu(x.device) and not torch.compiler.is_compiling():
        supervised = targets != IGNORE
        hidden = hidden[supervised]
        targets = targets[supervised]
    return _losses(head, hidden, targets, compiling, smoothing).sum()


def losses(
    head: nn.Module, x: Tensor, labels: Tensor, at: Tensor, *, compiling: bool, smoothing: float
) -> Tensor:
    """The summed loss of each of k equal blocks of rows, `(k,)`.

    `at` `(k, S)` are a block's positions to look at: all that are supervised, and a few others.
    """
    first = torch.arange(len(at), device=at.device) * (labels.numel() // len(at))
    rows = (at + first[:, None]).flatten()
    hidden = x.flatten(0, 1).index_select(0, rows)
    targets = shifted(labels)[rows]
    return _losses(head, hidden, targets, compiling, smoothing).view_as(at).sum(1)


def _losses(
    head: nn.Module, hidden: Tensor, targets: Tensor, compiling: bool, smoothing: float
) -> Tensor:
    """The loss at each position, `(N,)`, zero where nothing is learnt."""
    if not _is_plain(head):
        return cross_entropies(head(hidden), targets, smoothing)
    weight: Any = head.weight
    if weight.requires_grad and torch.is_grad_enabled():
        return cross_entropies(linear(hidden, weight), targets, smoothing)
    chunk_loss = _in_slices if devices.on_cpu(hidden.device) else _chunk
    if compiling and devices.on_cuda(hidden.device):
        chunk_loss = compiled(_chunk)
    supervised = targets != IGNORE
    wanted = targets.where(supervised, 0)
    losses = _FrozenHeadLoss.apply(hidden, weight, wanted, smoothing, chunk_loss)
    return losses.where(supervised, 0.0)


def _is_plain(head: nn.Module) -> bool:
    """Whether calling the head is `x Wᵀ` and nothing else: no other forward, bias or hook."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    state = vars(head)
    return (
        (type(head) is nn.Linear or getattr(type(head), "computes_linear", False))
        and state["_parameters"].get("bias") is None
        and "forward" not in state
        and not any(state[name] for name in hooks)
    )


class _FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropies of `hidden Wᵀ`; the gradient of `hidden` is made in the forward.

    So a chunk of logits is dropped as soon as it has given its share of both.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float, chunk_loss: Any
    ) -> Tensor:
        n = len(hidden)
        vocab = weight.shape[0]
        if devices.on_cuda(weight.device):
            weight = F.pad(weight, (0, 0, 0, -vocab % 64))
        else:
            hidden = F.pad(hidden, (0, 0, 0, -n % 8))
            targets = F.pad(targets, (0, -n % 8))
        how = ctx.needs_input_grad[0], smoothing
        size = devices.positions_at_a_time(hidden.device)

        chunks = zip(hidden.split(size), targets.split(size), strict=True)
        pairs = [chunk_loss(rows, weight, few, vocab, *how) for rows, few in chunks]
        losses, gradients = zip(*pairs, strict=True)
        ctx.save_for_backward(torch.cat(gradients)[:n])
        return torch.cat(losses)[:n]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "The loss of a frozen head can be differentiated once, without create_graph=True. "
                "For more take gpt2.next_token_loss(model(idx), labels), or torch.func."
            )
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0][:, None].to(gradient.dtype), None, None, None, None


def _chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab: int, learns: bool, smoothing: float = 0
) -> tuple[Tensor, Tensor]:
    """Losses and gradients of a chunk of positions; rows of `weight` past `vocab` are padding."""
    logits = hidden @ weight.t()  # (N, V padded)
    logits = logits.to(wide_enough(logits.dtype))
    if len(weight) > vocab:
        tokens = torch.arange(len(weight), device=hidden.device)
        logits = logits.masked_fill(tokens >= vocab, -torch.inf)

    wanted = targets[:, None]
    top = logits.amax(-1, keepdim=True)  # subtracted: far from zero, float32 is coarse
    at_wanted = logits.gather(1, wanted) - top
    sought = at_wanted
    right = 1.0
    if smoothing:
        sought = at_wanted.lerp(logits[:, :vocab].mean(-1, keepdim=True) - top, smoothing)
        right = 1 - smoothing + smoothing / vocab

    scores = logits.sub_(top).exp_()  # probabilities but for a factor
    total = scores.sum(-1, keepdim=True)  # in pairs; a softmax kernel's running sum is off by 1e-5
    loss = (total.log() - sought).squeeze(1)
    if not learns:
        return loss, hidden
    if smoothing:
        scores[:, :vocab] -= total * (smoothing / vocab)

    scores = scores.to(weight.dtype)
    less_one = (at_wanted.exp() - right * total).to(weight.dtype)  # where the token is right
    gradient = scores.scatter_(1, wanted, less_one) @ weight / total
    return loss, gradient.to(hidden.dtype)


def _in_slices(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab: int, learns: bool, smoothing: float = 0
) -> tuple[Tensor, Tensor]:
    """What `_chunk` gives, from a slice of the vocabulary after the other.

    A slice and its logits fit in a CPU's cache, so that the weight is read from memory once. What
    is summed so far is scaled anew where a slice holds a greater logit.

    Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
    """
    wide = wide_enough(hidden.dtype)
    top = hidden.new_full(targets.shape, -torch.inf, dtype=wide)
    total, at_wanted, gradient = top.new_zeros(()), top, hidden.new_zeros((), dtype=wide)

    size = max(1, CACHED // (len(hidden) + hidden.shape[1]))
    for start in range(0, vocab, size):
        rows = weight[start : start + size]
        logits = (rows @ hidden.t()).to(wide)  # (V of the slice, N)
        row = targets - start
        there = logits.gather(0, row.clamp(0, len(rows) - 1)[None])[0]
        at_wanted = there.where((row >= 0) & (row < len(rows)), at_wanted)

        before = top
        top = torch.maximum(top, logits.amax(0))
        scores = logits.sub_(top).exp_()
        shrunk = (before - top).exp()
        total = total * shrunk + scores.sum(0)
        if learns:
            added = scores.to(weight.dtype).t() @ rows
            gradient = gradient * shrunk[:, None] + added.to(wide)  # (N, C)

    unlike = (1 - smoothing) * weight[targets].to(wide)
    if smoothing:
        mean = weight.to(wide).mean(0)
        at_wanted = at_wanted.lerp(hidden.to(wide) @ mean, smoothing)
        unlike += smoothing * mean

    loss = total.log() + (top - at_wanted)
    if not learns:
        return loss, hidden
    return loss, (gradient / total[:, None] - unlike).to(hidden.dtype)
