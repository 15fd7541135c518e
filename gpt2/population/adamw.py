"""AdamW over a stack: each slot has its own rates, steps, clip, and end.

Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", as torch computes it.

Shapes: k slots · P parameters of a slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2.training.config import TrainConfig


class Rates(NamedTuple):
    """The numbers that a slot's update is made with."""

    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    correction1: float  # 1 - beta1 ** t
    correction2: float  # its root, of beta2
    clip: float  # largest norm of the gradient, infinite for none

    @classmethod
    def of(cls, config: TrainConfig, lr: float, t: int) -> Rates:
        """For a slot's step t, from 1."""
        beta1, beta2 = config.betas
        return cls(
            lr=lr,
            weight_decay=config.weight_decay,
            beta1=beta1,
            beta2=beta2,
            eps=config.eps,
            correction1=1 - beta1**t,
            correction2=(1 - beta2**t) ** 0.5,
            clip=float("inf") if config.clip is None else config.clip,
        )


IDLE = Rates(0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0)
"""Of a slot that is not updated."""


@torch.no_grad()
def update(
    parts: Mapping[str, tuple[Tensor, ...]], norm: Tensor, applied: Tensor, rates: Tensor
) -> None:
    """Update the slots that `applied` says, each by its own rates; the others keep every bit.

    Args:
        parts: by name, parameters, gradients, first and second moments, `(k, …)` each, and the
            factor of the learning rate, `(k,)`.
        norm: of each slot's gradient, `(k,)`.
        applied: booleans `(k,)`.
        rates: `(8, k)`, the fields of `Rates`.
    """
    lr, decay, beta1, beta2, eps, correction1, correction2, clip = rates[:, :, None].unbind()
    share = (clip / (norm[:, None] + 1e-6)).clamp(max=1.0)
    for parameters, gradients, first, second, ratio in parts.values():
        own_lr = lr * ratio[:, None]
        gradient = gradients * share
        mean = first.lerp(gradient, 1 - beta1)
        square = second * beta2 + (1 - beta2) * gradient * gradient
        moved = parameters * (1 - own_lr * decay)
        moved = moved - own_lr / correction1 * mean / (square.sqrt() / correction2 + eps)
        for tensor, value in ((parameters, moved), (first, mean), (second, square)):
            tensor.copy_(torch.where(applied[:, None], value, tensor))
