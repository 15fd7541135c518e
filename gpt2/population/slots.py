"""A slot: its training, what a pass reads for it, its AdamW and dropout.

Shapes: k slots · m blocks of a pass · b rows of a block · T time · S positions that learn.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt2.data.dataset import Dataset, offsets
from gpt2.data.order import Integers, Order, seed_of
from gpt2.fast import devices
from gpt2.fast.compiling import bucket
from gpt2.fast.dropout import drop
from gpt2.loss import IGNORE
from gpt2.training.config import TrainConfig, lr_scale, total_steps


class Batch(NamedTuple):
    """The micro-batch that a slot reads next."""

    slot: int
    examples: Integers  # by number
    width: int  # of the longest
    seed: int = 0  # of dropout
    tokens: int = 0  # supervised in the step that ends with it; else 0


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


@dataclass(kw_only=True)
class Slot:
    """A training in a slot, or taken out of it between two steps."""

    data: Dataset
    config: TrainConfig
    ratios: Mapping[str, float]  # of the learning rate, by the slots' parts
    until: int | None = None  # the step after which it rests; None for its last
    taken: int = 0  # steps
    micro: int = 0  # micro-batches of the current step
    losses: list[float] = field(default_factory=list[float])  # of its steps, nats a token
    ended: str | None = None  # why it ended before its last step
    occupant: Any = None  # out of a slot, what was in it
    moments: Tensor | float = 0.0  # out of a slot, AdamW's, `(2, P)`

    def __post_init__(self) -> None:
        self.total = total_steps(self.data, self.config)
        self.order = Order(len(self.data))

    @property
    def is_under_way(self) -> bool:
        """Whether it has a step to take."""
        end = self.total if self.until is None else min(self.until, self.total)
        return self.taken < end and self.ended is None

    def next_batch(self, slot: int, widths: Integers) -> Batch:
        """Take the next micro-batch, given the width of each example."""
        config = self.config
        n = len(self.data)
        size = config.batch_size * config.accumulate
        epoch, nth = divmod(self.taken, -(-n // size))
        span = np.arange(nth * size, min((nth + 1) * size, n))
        of_step = self.order.at(span, seed=config.seed, epoch=epoch)[0]
        start = self.micro * config.batch_size
        examples = of_step[start : start + config.batch_size]
        seed = seed_of(config.seed, self.taken + 1, self.micro)
        self.micro += 1
        tokens = 0
        if self.micro * config.batch_size >= len(of_step):
            self.taken += 1
            self.micro = 0
            tokens = int(self.data.supervised(of_step).sum())
        return Batch(slot, examples, int(widths[examples].max()), seed, tokens)

    def rates(self, tokens: int, parts: Iterable[str]) -> list[float]:
        """The `Rates` of the step just taken, then each part's learning rate."""
        config, step = self.config, self.taken
        beta1, beta2 = config.betas
        lr = config.lr * lr_scale(step, self.total, config)
        rates = Rates(
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
        return [*rates, *(lr * self.ratios.get(part, 1.0) for part in parts)]

    def keep(self, step: int, loss: float, norm: float) -> None:
        """Keep a step's loss; where a figure is not finite, end before that step."""
        if self.ended is not None:
            return
        self.losses.append(loss)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.ended = f"Step {step}: the loss is {loss} and the gradient's norm {norm}"
            self.taken = step - 1
            self.micro = 0


def widths_of(
    data: Dataset, k: int, size: int, limit: int, device: torch.device
) -> tuple[int, Integers]:
    """The width of all slots' pass, by which a tick has the fewest tokens; and each example's."""
    widths = np.arange(data.longest + 1)  # by length
    if devices.on_cuda(device):  # where each width is captured
        widths = np.array([bucket(max(1, n), limit) for n in widths.tolist()])
    fitting = (np.cumsum(data.histogram) / len(data)) ** size  # share of batches
    extra = 32 if devices.on_cpu(device) else 1024  # tokens that cost as much as a pass
    tokens = k * size * widths + k * (1 - fitting) * (extra + size * widths[-1])
    return int(widths[tokens.argmin()]), widths[data.lengths]


def inputs_of(
    data: Dataset, size: int, width: int, most: int, batches: Sequence[Batch | None]
) -> list[Tensor]:
    """Ids and labels `(m·b, T)`, and where in its block each slot learns, `(m, S)`."""
    m = len(batches)
    idx = np.zeros((m * size, width), np.int64)
    labels = np.full_like(idx, IGNORE)
    rows = [i * size + np.arange(len(batch.examples)) for i, batch in enumerate(batches) if batch]
    ids, learnt, lengths = data.take(np.concatenate([batch.examples for batch in batches if batch]))
    at = np.repeat(np.concatenate(rows), lengths), offsets(lengths)
    idx[at] = ids
    labels[at] = np.where(learnt, ids, IGNORE)

    learns = np.zeros(labels.shape, bool)
    learns[:, :-1] = labels[:, 1:] != IGNORE
    block, position = np.nonzero(learns.reshape(m, -1))
    positions = np.full((m, most), width - 1)  # of a row's last nothing is learnt
    positions[block, offsets(np.bincount(block, minlength=m))] = position
    return [torch.from_numpy(array) for array in (idx, labels, positions)]


def adamw(
    parts: Sequence[Sequence[Tensor]],
    lrs: Tensor,
    norm: Tensor,
    applied: Tensor,
    rates: Rates,
) -> None:
    """Update the slots where `applied` `(k,)` is true; the others keep every bit.

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
    """What drops on a CPU: each block's slot draws what it would draw alone."""

    def __init__(self, batches: Sequence[Batch | None]) -> None:
        self.batches = batches
        seeds = [batch.seed if batch else 0 for batch in batches]
        self._states = [torch.Generator().manual_seed(seed).get_state() for seed in seeds]

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
    """What drops elsewhere in one dropout: a hash of blocks' seeds `(m, 2)` and of the element."""

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
    h = keys.to(torch.int32) + (numbers * (0x9E3779B9 - 2**32))[:, None, None]  # (n, m, 2)
    for factor, shift in ((0x7FEB352D, 15), (0x846CA68B - 2**32, 13)):
        h = (h ^ ((h >> shift) & (2 ** (32 - shift) - 1))) * factor
    return [Hashes(seeds) for seeds in (h ^ ((h >> 16) & 0xFFFF)).unbind()]
