"""The loss of predicting each next token.

Labels lie beside the token ids; the shift by one happens here. `gpt2.fast.head` computes the same
from hidden states, never holding all logits.

Shapes: B batch · T time · V vocab.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100  # the label of a position that is not learnt


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy, in nats, over the supervised tokens.

    Args:
        logits: `(B, T, V)`, computed with in float32 at least.
        labels: `(B, T)`, aligned with the token ids.

    Raises:
        ValueError: no token is supervised, or the shapes do not fit.
    """
    total = summed(logits, labels)
    count = (shifted(labels) != IGNORE).sum()
    if not count:
        raise ValueError("No token is supervised: every label after the first is IGNORE.")
    return total / count


def summed(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """The cross-entropy summed over the supervised tokens, a scalar of float32 at least.

    `smoothing` is the share of each target that is spread evenly over all tokens.
    """
    return cross_entropies(logits.flatten(0, 1), shifted(labels), smoothing).sum()


def cross_entropies(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """The loss at each target `(N,)`, zero where it is `IGNORE`, of logits `(N, V)`."""
    logits = logits.to(wide_enough(logits.dtype))
    return F.cross_entropy(
        logits, targets, ignore_index=IGNORE, reduction="none", label_smoothing=smoothing
    )


def wide_enough(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a loss is computed: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def shifted(labels: Tensor) -> Tensor:
    """What each position is to predict, `(B·T,)`: the next label, nothing after the last."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()
