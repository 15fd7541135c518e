"""Trainings of a search on populations: some at a time, each as if it were alone.

Shapes: k slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

import gpt2
import lora
from gpt2.training.population import PopulationTraining
from gpt2.training.slots import SlotState

from .halving import Halving
from .runs import Place, Run

Progress = Callable[[int], None]
TICKS = {"cpu": 8}  # micro-batches between two looks at the device; on a faster one more
ROWS = {"cpu": 8}  # that are evaluated at a time, at least 8 a slot; on a faster one more


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

    def train(
        self, k: int, runs: Sequence[Run], halving: Halving, rung: int, progress: Progress
    ) -> None:
        """Take runs to the end of a rung; each knows then where it is, and how good.

        Args:
            k: slots.
            runs: at most as many.
            halving, rung: how far, and in how many steps a copy cools down that is judged.
            progress: called with the steps taken since the last call.
        """
        until, cooling = (
            [steps(rung, run.total) for run in runs]
            for steps in (halving.step, halving.cooldown_steps)
        )
        _, training = self._of(k)
        self._put(k, runs, until)
        self._advance(progress)
        for run, own in zip(runs, training.trainings, strict=False):
            if own is not None:
                run.curve += [record.loss for record in own.records]
                run.ended = own.ended
        self._keep(runs)
        taken = [run.taken for run in runs]
        self._cool(runs, cooling, progress)
        losses = training.evaluate(self.selection, self._rows(k))
        for run, step, loss in zip(runs, taken, losses, strict=False):
            if run.ended is None and not math.isfinite(loss):
                run.ended = f"Step {step}: the loss on the selection data is {loss}"
                run.place = None
            if run.ended is None:
                run.losses[step] = loss

    def _advance(self, progress: Progress) -> None:
        """Train until all slots have come to rest."""
        slots, training = self._of()
        ticks, done = TICKS.get(slots.flat.device.type, 64), self._recorded()
        while training.advance(ticks):
            now = self._recorded()
            progress(now - done)
            done = now

    def _recorded(self) -> int:
        _, training = self._of()
        return sum(len(own.records) for own in training.trainings if own)

    def _cool(self, runs: Sequence[Run], steps: Sequence[int], progress: Progress) -> None:
        """Go on in the slots with copies, as if the schedules came to their ends."""
        _, training = self._of()
        for slot, (run, more) in enumerate(zip(runs, steps, strict=True)):
            if run.ended is None and more:
                ends = {"epochs": None, "steps": run.taken + more, "schedule": "linear"}
                config = replace(run.recipe.training, **ends)
                training.go_on(slot, replace(training.state(slot), config=config))
        self._advance(progress)

    def _keep(self, runs: Sequence[Run]) -> None:
        """Keep where runs are that have not come to an end."""
        slots, training = self._of()
        moments = (training.step.first, training.step.second)
        alive = [i for i, run in enumerate(runs) if run.ended is None]
        if all(runs[i].is_over for i in alive):
            moments = [stack[:, :0] for stack in moments]
        rows = [stack.detach()[alive].cpu() for stack in (slots.flat, *moments)]
        for run in runs:
            run.place = None
        for i, slot in enumerate(alive):
            runs[slot].place = Place(*(row[i] for row in rows))

    def so_far(self, runs: Sequence[Run]) -> list[Run]:
        """Copies of runs that are being trained, with where they are.

        None in the midst of a step, nor while what trains is itself a copy that cools down.

        To be called between two looks at the device, in `train`'s `progress`.
        """
        _, training = self._of()
        owns = training.trainings[: len(runs)]
        pairs = list(zip(runs, owns, strict=True))
        if any(own and (own.micro or own.config is not run.recipe.training) for run, own in pairs):
            return []
        copies = [
            replace(
                run,
                curve=run.curve + [record.loss for record in own.records] if own else run.curve,
                ended=own.ended if own else run.ended,
            )
            for run, own in pairs
        ]
        self._keep(copies)
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
            if run.is_over:
                continue
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
