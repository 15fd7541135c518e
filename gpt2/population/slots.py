"""What the host knows of each training in a population: its config, its place in the data, its end.

Shapes: b rows of a slot · n examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from gpt2.data.dataset import Dataset, places
from gpt2.data.order import Integers, Order
from gpt2.loss import IGNORE
from gpt2.training.config import (
    TrainConfig,
    lr_scale,
    planned,
    require_count,
    steps_an_epoch,
    total_steps,
)
from gpt2.training.loop import StepRecord

OWN = frozenset(
    "lr epochs steps accumulate schedule warmup_ratio warmup_steps weight_decay betas eps clip "
    "seed".split()
)
"""The fields of a TrainConfig in which slots may differ."""


@dataclass(frozen=True, kw_only=True)
class SlotState:
    """A training taken out of its slot, with which it goes on in any slot.

    Args:
        occupant: what the slots give for what is trained.
        first, second: AdamW's moments, `(P,)` on the CPU.
        config, ratios, taken, records, ended: as `Slot` has them.
    """

    occupant: Any
    first: Tensor
    second: Tensor
    config: TrainConfig
    ratios: Mapping[str, float]
    taken: int
    records: list[StepRecord]
    ended: str | None


@dataclass(kw_only=True)
class Slot:
    """A training in a slot.

    Args:
        config: how it trains.
        data, order: the examples, and each epoch's order of them.
        total: steps of its whole schedule.
        batches, steps_an_epoch: micro-batches and steps of one pass over the data.
        until: the step after which it rests.
        ratios: factors of the learning rate for the slots' parts, by their name.
        taken: steps that it has taken.
        micro: micro-batches of its step under way.
        records: of its steps.
        ended: why it has come to an end of its own, if it has.
    """

    config: TrainConfig
    data: Dataset
    order: Order
    total: int
    batches: int
    steps_an_epoch: int
    until: int
    ratios: Mapping[str, float]
    taken: int = 0
    micro: int = 0
    records: list[StepRecord] = field(default_factory=list[StepRecord])
    ended: str | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether it has a step to take."""
        return self.taken < self.until and self.ended is None

    @property
    def epoch(self) -> int:
        """The epoch of its step under way, from 0."""
        return self.taken // self.steps_an_epoch

    @property
    def numbers(self) -> range:
        """The numbers, in its epoch, of the micro-batches of its step under way."""
        first = self.taken % self.steps_an_epoch * self.config.accumulate
        return range(first, min(first + self.config.accumulate, self.batches))

    @property
    def rate(self) -> float:
        """The learning rate of its step under way."""
        return self.config.lr * lr_scale(self.taken + 1, self.total, self.config)

    def micro_batch(self) -> tuple[Integers, int, bool]:
        """The examples of the next micro-batch, its step's tokens, and whether it is the last."""
        numbers = self.numbers
        tokens = int(self.data.supervised(self._examples(numbers)).sum())
        own = numbers[self.micro : self.micro + 1]
        return self._examples(own), tokens, self.micro + 1 == len(numbers)

    def record(self, tokens: int) -> StepRecord:
        """Of the step under way, whose loss, norm and time are not known yet."""
        return StepRecord(
            step=self.taken + 1,
            epoch=self.epoch + 1,
            loss=math.nan,
            lr=self.rate,
            grad_norm=math.nan,
            tokens=tokens,
            seconds=math.nan,
        )

    def go_on(self, *, is_last: bool) -> None:
        """The micro-batch was taken, and if it was the last the step too."""
        self.micro = 0 if is_last else self.micro + 1
        self.taken += is_last

    def tell(self, record: StepRecord, loss: float, norm: float, seconds: float) -> None:
        """What the device says of a step; one not finite was not applied, nor any after it."""
        if self.ended is not None:
            return
        record = replace(record, loss=loss, grad_norm=norm, seconds=seconds)
        self.records.append(record)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.taken, self.micro = record.step - 1, 0
            self.ended = f"Step {record.step}: the loss is {loss} and the gradient's norm {norm}"

    def _examples(self, numbers: range) -> Integers:
        """The examples of these micro-batches of the epoch."""
        n, size, config = len(self.data), self.config.batch_size, self.config
        span = np.arange(numbers.start * size, min(numbers.stop * size, n))
        return self.order.at(span, seed=config.seed, epoch=self.epoch)[0]


def check_state(state: SlotState, size: int) -> None:
    """Whether this is a training out of a slot of so many parameters.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(state, SlotState):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"state must be what state() gave, got {type(state).__name__}.")
    if {*state.first.shape, *state.second.shape} != {size}:
        there = f"{state.first.numel():,} parameters, and these have {size:,}"
        raise ValueError(f"The state is of slots of {there}.")


def opened(
    data: Dataset, config: TrainConfig, ratios: Mapping[str, float], until: int | None
) -> Slot:
    """A training at its beginning, that rests after step `until`, at the latest at its end.

    Raises:
        ValueError: `until` is no number of steps.
    """
    if until is not None:
        require_count("until", until)
    total = total_steps(data, config)
    until = total if until is None else min(until, total)
    return Slot(
        config=config,
        data=data,
        order=Order(len(data)),
        total=total,
        batches=len(planned(data, config)),
        steps_an_epoch=steps_an_epoch(data, config),
        until=until,
        ratios=dict(ratios),
    )


def most_learnt(data: Dataset, size: int) -> int:
    """The most tokens that so many examples can have learnt, rounded up to a multiple of 8.

    So each slot's begin at such a multiple: a product's rows differ in their last bits by that.
    """
    each = np.sort(data.supervised(np.arange(len(data))))
    return -(-int(each[-size:].sum()) // 8) * 8


def learnt_at(labels: Any, k: int, most: int) -> Integers:
    """Where in its block of `labels` `(k·b, T)` each slot learns, `(k, most)`.

    What is left of the room is a row's last position, after which nothing is learnt.
    """
    wanted = np.zeros(labels.shape, bool)
    wanted[:, :-1] = labels[:, 1:] != IGNORE
    slots, found = np.nonzero(wanted.reshape(k, -1))
    counts = np.bincount(slots, minlength=k)
    at = np.full((k, most), labels.shape[1] - 1)
    at[slots, places(counts)] = found
    return at


def rows_of(
    data: Dataset, chosen: Sequence[Integers], size: int, width: int
) -> tuple[Any, Any, list[tuple[int, int]]]:
    """A batch in which each slot's examples stand in its own block, and nothing else is learnt.

    Args:
        data: the examples.
        chosen: each slot's, at most `size`.
        size, width: b and T.

    Returns:
        Ids and labels `(k·b, T)`, int64, and how many rows and columns each slot fills.
    """
    idx = np.zeros((len(chosen) * size, width), np.int64)
    labels = np.full_like(idx, IGNORE)
    counts = [len(some) for some in chosen]
    rows = np.concatenate([np.arange(n) + i * size for i, n in enumerate(counts)])
    ids, learnt, lengths = data.take(np.concatenate(chosen))
    at = np.repeat(rows, lengths), places(lengths)
    idx[at], labels[at] = ids, np.where(learnt, ids, IGNORE)
    ends = np.cumsum(counts)
    longest = [int(lengths[e - n : e].max()) if n else 0 for n, e in zip(counts, ends, strict=True)]
    return idx, labels, list(zip(counts, longest, strict=True))
