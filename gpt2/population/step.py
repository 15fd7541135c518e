"""AdamW with rates of each slot, and dropout with a mask of each slot.

On a CPU a slot drops what it would drop alone. Elsewhere a mask is a hash of the slot's seed and
of the numbers of the dropout and of the element.

Shapes: k slots · m blocks of a pass · b rows of a block · T time.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from gpt2.fast.dropout import drop
from gpt2.population.slots import Batch
from gpt2.training.config import TrainConfig

GOLDEN = 0x9E3779B9


class Rates(NamedTuple):
    """The numbers of a slot's update, or as tensors `(k,)` those of all."""

    step: Any  # the number of the step that ends, from 1; 0 where none does
    share: Any  # 1 over the step's tokens, which makes sums means
    weight_decay: Any
    beta1: Any
    beta2: Any
    eps: Any
    correction1: Any  # 1 - beta1 ** t
    correction2: Any  # the root of 1 - beta2 ** t
    clip: Any  # largest norm of the gradient, infinite for none

    @classmethod
    def of(cls, config: TrainConfig, step: int, tokens: int) -> Self:
        """For a slot's step, from 1, of so many tokens."""
        beta1, beta2 = config.betas
        return cls(
            step=step,
            share=float(np.float32(1 / tokens)),  # as one training alone rounds it
            weight_decay=config.weight_decay,
            beta1=beta1,
            beta2=beta2,
            eps=config.eps,
            correction1=1 - beta1**step,
            correction2=math.sqrt(1 - beta2**step),
            clip=math.inf if config.clip is None else config.clip,
        )


def adamw(
    parts: Sequence[Sequence[Tensor]],
    lrs: Tensor,
    norm: Tensor,
    applied: Tensor,
    rates: Rates,
) -> None:
    """Update the slots where `applied` `(k,)` is true; the others keep every bit.

    A part is parameters, summed gradients, first and second moments.

    Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization".
    """
    r = Rates(*(rate[:, None] for rate in rates))
    factor = r.share * (r.clip / (norm[:, None] + 1e-6)).clamp(max=1.0)
    for stacks, lr in zip(parts, lrs[:, :, None], strict=True):
        parameters, gradients, first, second = stacks
        gradient = gradients * factor
        mean = first.lerp(gradient, 1 - r.beta1)
        square = second * r.beta2 + (1 - r.beta2) * gradient * gradient
        moved = parameters * (1 - lr * r.weight_decay)
        root = square.sqrt() / r.correction2 + r.eps
        moved = moved - lr / r.correction1 * mean / root
        for tensor, value in ((parameters, moved), (first, mean), (second, square)):
            tensor.copy_(torch.where(applied[:, None], value, tensor))


class Streams:
    """What drops on a CPU: each block's slot draws as if it were alone."""

    def __init__(self, batches: Sequence[Batch | None]) -> None:
        self.batches = batches
        self._states: list[Tensor] = []
        for batch in batches:
            torch.default_generator.manual_seed(batch.seed if batch else 0)
            self._states.append(torch.get_rng_state())

    def __call__(self, x: Tensor, p: float | Tensor) -> Tensor:
        """Drop elements of `(m·b, T, …)` or `(m·b, H, T, T)`, at one rate or `(m,)`."""
        m = len(self.batches)
        factors = torch.ones_like(x)
        rates = p.tolist() if isinstance(p, Tensor) else [p] * m
        for i, (batch, rate) in enumerate(zip(self.batches, rates, strict=True)):
            if batch and rate:
                start, T = i * len(x) // m, slice(batch.width)
                rows = slice(start, start + len(batch.examples))
                filled = (rows, T) if x.dim() == 3 else (rows, slice(None), T, T)
                torch.set_rng_state(self._states[i])
                _, keep = drop(x[filled].detach(), rate)
                self._states[i] = torch.get_rng_state()
                factors[filled] = keep.to(x.dtype) * (1 / (1 - rate))
        return x * factors


class Hashes:
    """What drops elsewhere in one dropout, by the blocks' seeds `(m, 2)` int32."""

    def __init__(self, seeds: Tensor) -> None:
        self.seeds = seeds

    def __call__(self, x: Tensor, p: float | Tensor) -> Tensor:
        """Drop elements of `(m·b, …)`, at one rate or `(m,)`."""
        first = self.seeds[:, :1]
        second = self.seeds[:, 1:]
        rates = p
        if not isinstance(rates, Tensor):
            rates = torch.full_like(first[:, 0], rates, dtype=torch.float32)
        threshold = (rates * 2**32).to(torch.int64).clamp(max=2**32 - 1) - 2**31
        rows = x.reshape(len(rates), -1)
        h = torch.arange(rows.shape[1], dtype=torch.int32, device=x.device)[None]
        h = (h ^ first) * 0x7FEB352D
        h = (h ^ ((h >> 15) & 0x1FFFF)) + second
        keep = h * (0x846CA68B - 2**32) >= threshold.to(torch.int32)[:, None]
        scale = (1 / (1 - rates)).to(x.dtype)[:, None]
        return torch.where(keep, rows * scale, 0).view(x.shape)


def hashes(keys: Tensor, n: int) -> list[Hashes]:
    """What drops in each of n dropouts, from the halves of seeds, `(m, 2)`."""
    numbers: Any = torch.arange(1, n + 1, dtype=torch.int32, device=keys.device)
    h = keys.to(torch.int32) + (numbers * (GOLDEN - 2**32))[:, None, None]  # (n, m, 2)
    for factor, shift in ((0x7FEB352D, 15), (0x846CA68B - 2**32, 13)):
        h = (h ^ ((h >> shift) & (2 ** (32 - shift) - 1))) * factor
    return [Hashes(seeds) for seeds in (h ^ ((h >> 16) & 0xFFFF)).unbind()]
