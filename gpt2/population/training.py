"""Many sets of parameters of one model, such as adapters, trained in one batch, each as if alone.

A tick is one micro-batch of each slot; a slot's step is over when its own micro-batches are.
Everything has one shape, whatever the slots do: an idle slot's rows learn nothing. So on a GPU a
tick is one CUDA graph, captured once.

Shapes: k slots · P parameters of a slot · b rows of a slot · T time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from gpt2.data.batches import collate
from gpt2.data.dataset import Dataset
from gpt2.data.order import Integers, seed_of
from gpt2.fast.compiling import bucket
from gpt2.model import GPT2, in_mode
from gpt2.population.adamw import IDLE, Rates
from gpt2.population.slots import (
    Slot,
    SlotState,
    check_state,
    learnt_at,
    most_learnt,
    opened,
    rows_of,
)
from gpt2.population.step import Slots, StackStep, check, check_own, check_under
from gpt2.training.config import TrainConfig, require_count
from gpt2.training.loop import StepRecord
from gpt2.training.losses import check_readable
from gpt2.training.randomness import RandomState

Taken = tuple[int, Slot, StepRecord]  # a step in this slot, of which the figures are not known yet


class PopulationTraining:
    """Trainings in the slots of a population.

    Args:
        model: a model that runs under `slots`, and is frozen but for them.
        slots: what is trained, such as a `lora.Population`.
        data: the examples.
        config: what all slots have in common; see `start`.

    Attributes:
        trainings: what is known of each slot's training; None where none was started.

    Raises:
        ValueError: no slots; the model cannot be called on the data, or drops where no slot can
            have a mask of its own; packing, token budgets, checkpointing: a population has none.
        RuntimeError: the model does not run under the slots.
    """

    def __init__(self, model: nn.Module, slots: Slots, data: Dataset, config: TrainConfig) -> None:
        check_readable(model, data)
        if not hasattr(slots, "flat"):
            raise ValueError(f"slots must be a lora.Population, got {type(slots).__name__}.")
        check(model, slots, config)
        self.model, self.slots, self.data, self.config = model, slots, data, config
        self.trainings: list[Slot | None] = [None] * len(slots.flat)
        self.step = StackStep(model, slots, config)
        limit = model.config.block_size if isinstance(model, GPT2) else data.longest
        self.width = bucket(data.longest, limit) if self.step.graphs else data.longest
        self._most = most_learnt(data, config.batch_size)
        self._randomness = RandomState(config.seed, slots.flat.device)
        self._untold: list[tuple[list[Taken], Tensor]] = []

    def start(
        self,
        slot: int,
        config: TrainConfig,
        *,
        ratios: Mapping[str, float] | None = None,
        until: int | None = None,
    ) -> None:
        """Begin a training of what is in a slot.

        Args:
            slot: its number.
            config: as for `gpt2.train`; slots may differ in learning rate, schedule, warm-up, steps
                or epochs, accumulation, weight decay, betas, eps, clip and seed.
            ratios: factors of the learning rate by the slots' parts; 1 where none is given.
            until: the step to rest after; None for the end of its schedule.

        Raises:
            ValueError: a config that differs in more; a part or a slot that there is not, or that
                is empty; a ratio or a step out of range.
        """
        own = self._opened(slot, config, ratios or {}, until)
        self.slots.take(slot)  # raises of a slot that is empty, in which nothing would be trained
        self._begin(slot, own)

    def advance(self, ticks: int) -> int:
        """Take at most so many micro-batches of each slot under way; then look at the device.

        Returns:
            How many were taken: fewer where all slots have come to rest, 0 where none is under way.

        Raises:
            ValueError: no such number of ticks.
            RuntimeError: the model does not run under the slots any more.
        """
        require_count("ticks", ticks)
        check_under(self.model, self.slots)
        began, done = time.perf_counter(), 0
        with in_mode(self.model, training=True), self._randomness, self.step.in_force():
            while done < ticks and any(own and own.is_under_way for own in self.trainings):
                self._tick()
                done += 1
        self._tell(began)
        return done

    def state(self, slot: int) -> SlotState:
        """A training between two of its steps, to go on with in any slot.

        Raises:
            ValueError: nothing was started there, or it is in the midst of a step.
        """
        own = self._training(slot)
        if own.micro:
            raise ValueError(f"Slot {slot} is in the midst of a step: let it come to rest first.")
        return SlotState(
            occupant=self.slots.take(slot),
            first=self.step.first[slot].to("cpu", copy=True),
            second=self.step.second[slot].to("cpu", copy=True),
            config=own.config,
            ratios=own.ratios,
            taken=own.taken,
            records=list(own.records),
            ended=own.ended,
        )

    def go_on(self, slot: int, state: SlotState, *, until: int | None = None) -> None:
        """Put a training into a slot, where it goes on as if it had never left its own.

        Args:
            slot: its number.
            state: of the training.
            until: as for `start`.

        Raises:
            ValueError: as `start`; the state is none, or of slots of another size.
        """
        check_state(state, self.slots.flat.shape[1])
        own = self._opened(slot, state.config, state.ratios, until)
        self.slots.put(slot, state.occupant)
        own.taken, own.records, own.ended = state.taken, list(state.records), state.ended
        self._begin(slot, own)
        self.step.first[slot] = state.first.to(self.step.device)
        self.step.second[slot] = state.second.to(self.step.device)

    def retire(self, slot: int) -> None:
        """End a training: its slot is idle, and keeps what was trained."""
        self._training(slot)
        self.trainings[slot] = None

    @torch.no_grad()
    def evaluate(self, data: Dataset, batch_size: int = 8) -> list[float]:
        """The mean loss of every slot over all supervised tokens, without dropout.

        Args:
            data: the examples, all of them for each slot.
            batch_size: examples of a slot in a forward pass.

        Raises:
            ValueError: as `gpt2.evaluate`.
            RuntimeError: the model does not run under the slots any more.
        """
        check_readable(self.model, data)
        check_under(self.model, self.slots)
        require_count("batch_size", batch_size)
        k, order = len(self.trainings), data.by_length[::-1]
        total, tokens = torch.zeros(k, dtype=torch.float64), 0
        with in_mode(self.model, training=False), self._randomness:
            for start in range(0, len(data), batch_size):
                batch = collate(data, order[start : start + batch_size])
                n = batch.n_tokens  # on a GPU few numbers occur, since chunks may be compiled
                most = bucket(n, batch.labels.numel()) if self.step.graphs else n
                at = torch.from_numpy(learnt_at(batch.labels.numpy(), 1, most))
                idx, labels, at = (
                    t.repeat(k, 1).to(self.step.device) for t in (batch.idx, batch.labels, at)
                )
                total += self.step.losses(idx, labels, at).double().cpu()
                tokens += batch.n_tokens
        return (total / tokens).tolist()

    def _opened(
        self, slot: int, config: TrainConfig, ratios: Mapping[str, float], until: int | None
    ) -> Slot:
        self._require_slot(slot)
        check_own(slot, config, self.config, ratios, self.slots.parts)
        return opened(self.data, config, ratios, until)

    def _begin(self, slot: int, own: Slot) -> None:
        self.trainings[slot] = own
        self.step.begin(slot, own.ratios)

    def _require_slot(self, slot: int) -> None:
        if type(slot) is not int or not 0 <= slot < len(self.trainings):
            raise ValueError(f"slot must be in 0..{len(self.trainings) - 1}, got {slot!r}.")

    def _training(self, slot: int) -> Slot:
        self._require_slot(slot)
        if (own := self.trainings[slot]) is None:
            raise ValueError(f"No training was started in slot {slot}.")
        return own

    def _tick(self) -> None:
        """One micro-batch of each slot under way."""
        k = len(self.trainings)
        chosen: list[Integers] = [np.empty(0, np.int64)] * k
        seeds: list[int | None] = [None] * k
        numbers, over = [[*IDLE, 0.0, 0.0] for _ in range(k)], list[Taken]()
        for i, own in enumerate(self.trainings):
            if own is None or not own.is_under_way:
                continue
            seeds[i] = seed_of(own.config.seed, own.taken + 1, own.micro)
            chosen[i], tokens, is_last = own.micro_batch()
            rates = Rates.of(own.config, own.rate, own.taken + 1)
            share = float(np.float32(1 / tokens))  # as one training alone rounds it
            numbers[i] = [*rates, share, float(is_last)]
            if is_last:
                over.append((i, own, own.record(tokens)))
            own.go_on(is_last=is_last)
        idx, labels, sizes = rows_of(self.data, chosen, self.config.batch_size, self.width)
        rates = torch.tensor(numbers, dtype=self.slots.flat.dtype, device="cpu").t().contiguous()
        at = torch.from_numpy(learnt_at(labels, k, self._most))
        figures = self.step(
            torch.from_numpy(idx), torch.from_numpy(labels), at, rates, seeds, sizes
        )
        self._untold.append((over, figures))

    def _tell(self, began: float) -> None:
        """Look at the device: the records of the steps taken, and the trainings that failed."""
        if not self._untold:
            return
        rows = torch.stack([figures.flatten() for _, figures in self._untold]).tolist()
        seconds, k = time.perf_counter() - began, len(self.trainings)
        untold, self._untold = self._untold, []
        for (over, _), row in zip(untold, rows, strict=True):
            for i, own, record in over:
                own.tell(record, row[i], row[k + i], seconds)
