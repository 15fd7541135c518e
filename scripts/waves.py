"""Trainings of a search on populations: some at a time, each as if it were alone.

Shapes: k slots · P parameters of a slot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import gpt2
import lora
from gpt2.training.population import PopulationTraining
from gpt2.training.slots import SlotState
from recipe import Recipe

Progress = Callable[[int], None]
TICKS = {"cpu": 8}  # micro-batches between two looks at the device; on a faster one more
ROWS = {"cpu": 8}  # that are evaluated at a time, at least 8 a slot; on a faster one more
DEFAULT = "default"  # the configuration that takes no part


@dataclass(frozen=True)
class Place:
    """Where a training is between two waves: parameters and AdamW's moments, `(P,)` each."""

    flat: Tensor
    first: Tensor
    second: Tensor


@dataclass(kw_only=True)
class Run:
    """A trial's training under a seed.

    Args:
        trial: its number, or `DEFAULT`.
        recipe: how it is trained; its seed is the run's.
        total: steps of its whole schedule.
        curve: the training loss of each step.
        losses: on the selection data, by step.
        ended: why it came to an end of its own, if it did.
        place: where it is, if it goes on.
    """

    trial: int | str
    recipe: Recipe
    total: int
    curve: list[float] = field(default_factory=list[float])
    losses: dict[int, float] = field(default_factory=dict[int, float])
    ended: str | None = None
    place: Place | None = None

    @property
    def seed(self) -> int:
        """Of its order of data, dropout and first A."""
        return self.recipe.training.seed

    @property
    def taken(self) -> int:
        """Steps that it has taken, the one included that failed."""
        return len(self.curve)

    @property
    def loss(self) -> float:
        """The last on the selection data; NaN where it ended."""
        return math.nan if self.ended or not self.losses else self.losses[max(self.losses)]


class Waves:
    """Populations of one room, of as many slots as are needed.

    Args:
        model: the base, without adapters.
        learnt, selection: the data.
        common: what all trainings have in common.
        room: the adapter in whose place each one's fits.
    """

    def __init__(
        self,
        model: gpt2.GPT2,
        learnt: gpt2.Dataset,
        selection: gpt2.Dataset,
        common: gpt2.TrainConfig,
        room: lora.LoRAConfig,
    ) -> None:
        self.model, self.learnt, self.selection = model, learnt, selection
        self.common, self.room = common, room
        self._slots: lora.Population | None = None
        self._training: PopulationTraining | None = None

    def __enter__(self) -> Waves:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the population off the model."""
        if self._slots:
            self._slots.eject()
        self._slots = self._training = None

    def train(self, k: int, runs: Sequence[Run], until: Sequence[int], progress: Progress) -> None:
        """Take runs to these steps and evaluate them, in k slots; each knows then what came out."""
        slots, training = self._of(k)
        self._put(k, runs, until)
        ticks, before = TICKS.get(slots.flat.device.type, 64), sum(run.taken for run in runs)
        done = 0
        while training.advance(ticks):
            now = sum(len(own.records) for own in training.trainings if own)
            progress(now - done)
            done = now
        losses = training.evaluate(self.selection, self._rows(k))
        for run, own, loss in zip(runs, training.trainings, losses, strict=False):
            if own is None:
                continue
            run.curve += [record.loss for record in own.records]
            run.ended = own.ended
            if run.ended is None and not math.isfinite(loss):
                run.ended = f"Step {own.taken}: the loss on the selection data is {loss}"
            if run.ended is None:
                run.losses[own.taken] = loss
        assert sum(run.taken for run in runs) == before + done

    def keep(self, runs: Sequence[Run], which: Sequence[int]) -> None:
        """Of the runs that were just trained, keep where these are; the others' end here."""
        slots, training = self._of()
        stacks = (slots.flat, training.step.first, training.step.second)
        rows = [stack.detach()[list(which)].cpu() for stack in stacks] if which else []
        for run in runs:
            run.place = None
        for i, slot in enumerate(which):
            runs[slot].place = Place(*(row[i] for row in rows))

    def so_far(self, runs: Sequence[Run]) -> list[Run]:
        """Copies of runs that are being trained, with where they are; none in the midst of a step.

        To be called between two looks at the device, in `train`'s `progress`.
        """
        _, training = self._of()
        owns = training.trainings[: len(runs)]
        if any(own is not None and own.micro for own in owns):
            return []
        copies = [
            replace(
                run,
                curve=run.curve + [record.loss for record in own.records] if own else run.curve,
                ended=own.ended if own else run.ended,
            )
            for run, own in zip(runs, owns, strict=True)
        ]
        self.keep(copies, [i for i, run in enumerate(copies) if run.ended is None])
        return copies

    def evaluate(self, k: int, runs: Sequence[Run], data: gpt2.Dataset) -> list[float]:
        """The loss of runs, where they are kept, on other data."""
        found: list[float] = []
        for first in range(0, len(runs), k):
            some = runs[first : first + k]
            _, training = self._of(k)
            self._put(k, some, [run.taken for run in some])
            found += training.evaluate(data, self._rows(k))[: len(some)]
        return found

    def saved(self, run: Run, save: Callable[[gpt2.GPT2], None]) -> None:
        """Call `save` with the model, which carries the run's adapter as an ordinary one."""
        slots, _ = self._of(1)
        self._put(1, [run], [run.taken])
        with slots.adapter(0):
            save(self.model)

    def _rows(self, k: int) -> int:
        device = next(self.model.parameters()).device
        return max(8, ROWS.get(device.type, 512) // k)

    def _of(self, k: int | None = None) -> tuple[lora.Population, PopulationTraining]:
        """The population, of k slots."""
        if self._slots is None or (k is not None and len(self._slots) != k):
            self.close()
            self._slots = lora.Population(self.model, k or 1, self.room)
            self._training = PopulationTraining(self.model, self._slots, self.learnt, self.common)
        assert self._training is not None
        return self._slots, self._training

    def _put(self, k: int, runs: Sequence[Run], until: Sequence[int]) -> None:
        """A run in each slot, at its beginning or where it is kept; no other slot is under way."""
        slots, training = self._of(k)
        training.trainings[:] = [None] * k
        for slot, (run, step) in enumerate(zip(runs, until, strict=True)):
            recipe, place = run.recipe, run.place
            if run.ended is not None:
                continue
            try:
                slots.draw(slot, recipe.adapter)
            except ValueError as error:  # such as a rank above a layer's side
                run.ended = str(error)
                continue
            ratios = {"B": recipe.b_ratio}
            if place is None:
                training.start(slot, recipe.training, ratios=ratios, until=step)
                continue
            with torch.no_grad():
                slots.flat[slot] = place.flat.to(slots.flat.device)
            state = SlotState(
                occupant=slots.take(slot),
                first=place.first,
                second=place.second,
                config=recipe.training,
                ratios=ratios,
                taken=run.taken,
                records=[],
                ended=None,
            )
            training.go_on(slot, state, until=max(step, 1))
