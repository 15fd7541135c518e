"""What the host knows of each slot's training, and what a pass reads.

Shapes: k slots · m blocks of a pass · b rows of a block · T time · S positions that learn.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt2.data.dataset import Dataset, offsets
from gpt2.data.order import Integers, Order, seed_of
from gpt2.fast import devices
from gpt2.fast.compiling import bucket
from gpt2.loss import IGNORE
from gpt2.training.config import TrainConfig, lr_scale, total_steps


class SlotRecord(NamedTuple):
    """One step of a slot."""

    step: int  # from 1
    loss: float  # mean over the step's supervised tokens, nats
    grad_norm: float  # before clipping


class Batch(NamedTuple):
    """The micro-batch that a slot reads next."""

    slot: int
    examples: Integers  # by number
    width: int  # of the longest
    seed: int = 0  # of dropout
    tokens: int = 0  # supervised in the step that ends with it; else 0


@dataclass(kw_only=True)
class Slot:
    """A training in a slot, or taken out of it between two steps.

    Args:
        data: the examples.
        config: how it trains.
        ratios: factors of the learning rate by the slots' parts.
        until: the step after which it rests; None for its last.
        taken: steps that it has taken.
        micro: micro-batches that its current step has taken.
        records: one a step.
        ended: why it ended before its last step, or None.
        occupant: out of a slot, what was in it.
        moments: out of a slot, AdamW's, `(2, P)`.
    """

    data: Dataset
    config: TrainConfig
    ratios: Mapping[str, float]
    until: int | None = None
    taken: int = 0
    micro: int = 0
    records: list[SlotRecord] = field(default_factory=list[SlotRecord])
    ended: str | None = None
    occupant: Any = None
    moments: Tensor | float = 0.0

    def __post_init__(self) -> None:
        self.total = total_steps(self.data, self.config)
        self.order = Order(len(self.data))

    @property
    def is_under_way(self) -> bool:
        """Whether it has a step to take."""
        end = self.total if self.until is None else min(self.until, self.total)
        return self.taken < end and self.ended is None

    @property
    def lr(self) -> float:
        """The learning rate of the last step that was taken."""
        return self.config.lr * lr_scale(self.taken, self.total, self.config)

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

    def keep(self, step: int, loss: float, norm: float) -> None:
        """Keep a step's figures. If they are not finite, no later step was applied."""
        if self.ended is not None:
            return
        self.records.append(SlotRecord(step, loss, norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            figures = f"the loss is {loss} and the gradient's norm {norm}"
            self.ended = f"Step {step}: {figures}"
            self.taken = step - 1
            self.micro = 0


def pass_widths(
    data: Dataset, k: int, size: int, limit: int, device: torch.device
) -> tuple[int, Integers]:
    """The width of the pass of all k slots, and the width that each example needs.

    A slot with a wider batch runs alone. The choice makes the fewest tokens in a tick.
    """
    lengths = np.arange(data.longest + 1)
    widths = lengths
    if devices.on_cuda(device):  # where each width is captured
        widths = np.array([bucket(max(1, n), limit) for n in lengths.tolist()])
    fitting = (np.cumsum(data.histogram) / len(data)) ** size  # share of batches
    extra = 32 if devices.on_cpu(device) else 1024  # tokens that cost as much as a pass
    tokens = k * size * widths + k * (1 - fitting) * (extra + size * widths[-1])
    return int(widths[tokens.argmin()]), widths[data.lengths]


def pass_inputs(
    data: Dataset, size: int, width: int, most: int, batches: Sequence[Batch | None]
) -> list[Tensor]:
    """Ids and labels `(m·b, T)`, and where in its block each slot learns, `(m, S)`."""
    m = len(batches)
    idx = np.zeros((m * size, width), np.int64)
    labels = np.full_like(idx, IGNORE)
    chosen = [batch.examples for batch in batches if batch]
    rows = [i * size + np.arange(len(batch.examples)) for i, batch in enumerate(batches) if batch]
    ids, learnt, lengths = data.take(np.concatenate(chosen))
    at = np.repeat(np.concatenate(rows), lengths), offsets(lengths)
    idx[at] = ids
    labels[at] = np.where(learnt, ids, IGNORE)

    learns = np.zeros(labels.shape, bool)
    learns[:, :-1] = labels[:, 1:] != IGNORE
    block, position = np.nonzero(learns.reshape(m, -1))
    positions = np.full((m, most), width - 1)  # of a row's last nothing is learnt
    positions[block, offsets(np.bincount(block, minlength=m))] = position
    arrays = idx, labels, positions
    return [torch.from_numpy(array) for array in arrays]
