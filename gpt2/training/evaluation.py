"""The loss on examples that are only read: of a base, of an adapter, in the middle of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from gpt2.data.batches import collate
from gpt2.data.tokens import Dataset
from gpt2.training import distributed
from gpt2.training.checks import check_readable
from gpt2.training.modes import in_mode
from gpt2.training.randomness import RandomState
from gpt2.training.wrapped import summed_loss


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well a model predicts some examples."""

    loss: float  # mean over the supervised tokens, nats
    tokens: int  # supervised
    examples: int

    @property
    def perplexity(self) -> float:
        """Among how many equally likely tokens the model hesitates; infinite past a float."""
        return math.exp(self.loss) if not self.loss > 709 else math.inf


def evaluate(
    model: nn.Module, data: Dataset, *, batch_size: int = 8, autocast: bool = False
) -> Evaluation:
    """The mean loss over all supervised tokens of the data, without dropout.

    Modes, gradients and random states are afterwards as before. A frozen head's logits exist for a
    few positions at a time, so that no more memory is taken than a training step takes.

    Args:
        model: as for `gpt2.train`.
        data: the examples.
        batch_size: examples a forward pass. Each pass gives a float32 sum, and the sums are added
            in float64, so that another batch size changes the loss by rounding only (about 1e-6 of
            it).
        autocast: compute in bfloat16 beside float32 weights.

    Raises:
        ValueError: the model cannot be called on the data; `batch_size` is below 1.
    """
    check_readable(model, data)
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}.")
    device = next(iter(model.parameters())).device
    order = data.by_length[::-1]  # alike in length: little padding; the largest batch first
    starts = range(0, len(data), batch_size)
    found: list[list[float]] = []
    with in_mode(model, training=False), RandomState(0, device), torch.no_grad():
        for start in distributed.strided(starts):
            batch = collate([data[int(i)] for i in order[start : start + batch_size]])
            moved = batch.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = summed_loss(model, moved.idx, moved.labels)
            found.append([float(loss), batch.n_tokens])
    total, tokens = 0.0, 0
    for loss, count in distributed.interleaved(found, device)[: len(starts)]:
        total, tokens = total + loss, tokens + int(count)
    return Evaluation(loss=total / tokens, tokens=tokens, examples=len(data))
