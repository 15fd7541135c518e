"""Trainings of a search on populations: k slots at a time, each as if it were alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import gpt2
import lora
from gpt2.population.slots import Slot
from gpt2.population.training import PopulationTraining

from .halving import Halving
from .trials import Run

Progress = Callable[[int], None]
TICKS = {"cpu": 8}  # micro-batches between two looks at the device; on a faster one more
ROWS = {"cpu": 8}  # that are evaluated at a time, at least 8 a slot; on a faster one more
STACKS = 10  # copies of a slot's parameters: with gradients, moments, and an update's own tensors
SPARE = 0.9  # share of what is free that may be taken


class Waves:
    """Populations of one room, the adapter in whose place each trial's fits.

    The trainings, at most `slots` at a time, have `common` in common; `tell` is given a line where
    the slots become fewer.
    """

    def __init__(
        self,
        model: gpt2.GPT2,
        train: gpt2.Dataset,
        validation: gpt2.Dataset,
        common: gpt2.TrainConfig,
        room: lora.LoRAConfig,
        slots: int,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.model, self.data, self.validation = model, train, validation
        self.common, self.room, self.slots, self.tell = common, room, slots, tell
        self.device = next(model.parameters()).device
        self.population: lora.Population | None = None

    def __enter__(self) -> Waves:
        return self

    def __exit__(self, *_: object) -> None:
        """Take the population off the model."""
        if self.population:
            self.population.eject()
        self.population = None

    def train(
        self, k: int, runs: Sequence[Run], halving: Halving, rung: int, progress: Progress
    ) -> None:
        """Take runs, which an earlier process may have brought to the end, to the end of a rung.

        Each is judged by a copy that cools down. `progress` is called with the steps taken. Where a
        GPU has too little memory the slots are halved, which changes no result.
        """
        todo = [run for run in runs if halving.step(rung, run.total) not in run.losses]
        while not all(run.ended for run in todo):
            k = min(k, self.slots)
            try:
                self._train(k, todo[:k], halving, rung, progress)
                todo = todo[k:]
            except torch.OutOfMemoryError:
                if k == 1:
                    raise
                self.__exit__()
                torch.cuda.empty_cache()
                self.slots = k // 2
                self.tell(f"Memory ran out with {k} slots: {self.slots} are trained at a time now.")

    def _train(
        self, k: int, runs: Sequence[Run], halving: Halving, rung: int, progress: Progress
    ) -> None:
        self._put(k, runs, [halving.step(rung, run.total) for run in runs])
        self._advance(progress)
        rested = self.so_far(runs)
        for slot, run in enumerate(rested):  # a copy goes on as if the schedule came to its end
            if run.ended is None and (more := halving.cooldown_steps(rung, run.total)):
                ends = {"epochs": None, "steps": run.taken + more, "schedule": "linear"}
                copy = replace(run.recipe.training, **ends)
                self.training.go_on(slot, replace(self.training.state(slot), config=copy))
        self._advance(progress)
        losses = self.training.evaluate(self.validation, self._rows())
        for run, end, loss in zip(runs, rested, losses, strict=False):
            run.curve, run.ended, run.position = end.curve, end.ended, end.position
            if run.ended is None and not math.isfinite(loss):
                run.ended = f"Step {run.taken}: the loss on the validation data is {loss}"
                run.position = None
            if run.ended is None:
                run.losses[run.taken] = loss

    def _advance(self, progress: Progress) -> None:
        """Train until all slots have come to rest."""

        def recorded() -> int:
            return sum(len(own.records) for own in self.training.trainings if own)

        ticks, done = TICKS.get(self.device.type, 64), recorded()
        while self.training.advance(ticks):
            progress(recorded() - done)
            done = recorded()

    def so_far(self, runs: Sequence[Run]) -> list[Run]:
        """Runs, those that are in the slots as copies with where they are; for use in `progress`.

        None in the midst of a step, nor while what trains is itself a copy that cools down.
        """
        slots = self.training.trainings
        pairs = list(zip(self._runs, slots, strict=False))
        if any(own and (own.micro or own.config is not run.recipe.training) for run, own in pairs):
            return []
        copies = [replace(run, position=None) for run in self._runs]
        for copy, own in zip(copies, slots, strict=False):
            if own:
                copy.curve = copy.curve + [record.loss for record in own.records]
                copy.ended = own.ended
        alive = [i for i, copy in enumerate(copies) if copy.ended is None]
        moments = [*self.training.moments]
        if all(copies[i].taken >= copies[i].total for i in alive):
            moments = [stack[:, :0] for stack in moments]
        assert self.population
        stacks = [stack.detach().cpu()[alive] for stack in (self.population.flat, *moments)]
        for i, position in zip(alive, zip(*stacks, strict=True), strict=True):
            copies[i].position = position
        in_slots = {id(run): copy for run, copy in zip(self._runs, copies, strict=True)}
        return [in_slots.get(id(run), run) for run in runs]

    def evaluate(self, runs: Sequence[Run], data: gpt2.Dataset) -> list[float]:
        """The loss of runs, where they are kept, on other data."""
        losses, k = list[float](), min(self.slots, len(runs))
        for some in (runs[i : i + k] for i in range(0, len(runs), k)):
            self._put(k, some, [run.taken for run in some])
            losses += self.training.evaluate(data, self._rows())[: len(some)]
        return losses

    def saved(self, run: Run, save: Callable[[gpt2.GPT2], None]) -> None:
        """Call `save` with the model, which carries the run's adapter as an ordinary one."""
        self._put(1, [run], [run.taken])
        assert self.population
        with self.population.adapter(0):
            save(self.model)

    def check_memory(self, usual: Run, processes: int) -> None:
        """Measure a step of one slot, and refuse with a ValueError what does not fit, on a CPU, for
        all processes of this machine; elsewhere find out what a population lacks."""
        self._put(1, [usual], [1])
        if (free := available(self.device)) is None:
            return
        each, gib = self._measured(), 2**30
        self.__exit__()
        fit = int(free * SPARE / processes // each)
        if self.slots > fit:
            do = f"give --slots {fit}" if fit else "give a smaller train_batch_size or a smaller r"
            of = f" of each of {processes} processes" if processes > 1 else ""
            need = processes * self.slots * each / gib
            raise ValueError(
                f"{self.slots:,} slots{of} take about {need:,.2f} GiB, and {free / gib:,.2f} are "
                f"free: about {fit:,} fit. So {do}."
            )

    def _measured(self) -> int:
        """Bytes that a slot takes: what its backward pass needs, and copies of its parameters."""
        saved, base = dict[int, int](), {p.data_ptr() for p in self.model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in base:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.training.advance(1)
        assert self.population
        return sum(saved.values()) + STACKS * self.population.flat.untyped_storage().nbytes()

    def _rows(self) -> int:
        return max(8, ROWS.get(self.device.type, 512) // len(self.training.trainings))

    def _put(self, k: int, runs: Sequence[Run], until: Sequence[int]) -> None:
        """A run in each slot, at its beginning or where it is kept; no other slot is under way."""
        if self.population is None or len(self.population) != k:
            self.__exit__()
            self.population = lora.Population(self.model, k, self.room)
            self.training = PopulationTraining(self.model, self.population, self.data, self.common)
        slots, training, self._runs = self.population, self.training, runs
        training.trainings[:] = [None] * k
        for slot, (run, step) in enumerate(zip(runs, until, strict=True)):
            if run.ended is not None:
                continue
            try:
                slots.draw(slot, run.recipe.adapter)
            except ValueError as error:  # such as a rank above a layer's side
                run.ended = str(error)
                continue
            config, ratios = run.recipe.training, {"B": run.recipe.b_ratio}
            if run.position is None:
                training.start(slot, config, ratios=ratios, until=step)
                continue
            flat, *moments = run.position
            with torch.no_grad():
                slots.flat[slot] = flat.to(slots.flat.device)
            if run.taken < run.total:
                kept = {"occupant": slots.take(slot), "moments": torch.stack(moments)}
                options = {"config": config, "ratios": ratios, "taken": run.taken}
                state = Slot(data=self.data, **options, **kept)
                training.go_on(slot, state, until=max(step, 1))


def largest_rank(model: gpt2.GPT2, room: lora.LoRAConfig) -> int:
    """The largest rank that fits all of the layers that a room adapts."""
    smallest = lora.Population(model, 1, room)
    smallest.eject()
    return min(min(la.A.shape[2], la.B.shape[1]) for la in smallest.layers.values())


def available(device: torch.device) -> int | None:
    """Bytes that a CPU's machine, and this group of processes, has free; on Linux."""
    found: list[int] = []
    if device.type == "cpu":
        with suppress(OSError, ValueError, IndexError):
            text = Path("/proc/meminfo").read_text()
            found.append(int(text.partition("MemAvailable:")[2].split()[0]) * 1024)
        with suppress(OSError, ValueError):
            limit, used = (
                Path(f"/sys/fs/cgroup/memory.{n}").read_text() for n in ("max", "current")
            )
            found.append(int(limit) - int(used))
    return min(found, default=None)
