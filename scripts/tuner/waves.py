"""Trainings of a search in populations, each equal to alone."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gpt2
import lora
from gpt2.population.slots import Slot
from gpt2.population.training import PopulationTraining

from ..runs import processes
from .halving import Plan
from .trials import DEFAULT, Run

Progress = Callable[[int], None]
TICKS = {"cpu": 8}  # micro-batches a look; elsewhere 64
ROWS = {"cpu": 8}  # evaluated at once; elsewhere 512
STACKS = 10  # of a slot's parameters: gradients, moments, an update's tensors
SPARE = 0.9  # share of free memory


class Waves:
    """Populations for a plan; `tell` gets a line if slots become fewer."""

    def __init__(
        self,
        model: gpt2.GPT2,
        train: gpt2.Dataset,
        validation: gpt2.Dataset,
        plan: Plan,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.model, self.data, self.validation = model, train, validation
        self.plan, self.slots, self.tell = plan, plan.slots, tell
        self.room = plan.space.room(plan.usual)
        self.device = next(model.parameters()).device
        self.population: lora.Population | None = None

    def __enter__(self) -> "Waves":
        return self

    def __exit__(self, *_: object) -> None:
        if self.population:
            self.population.eject()
        self.population = None

    def train(self, runs: list[Run], rung: int, progress: Progress) -> None:
        """Take runs to the end of a rung.

        A copy that cools down is judged. `progress` gets the steps taken. Where a GPU's memory
        runs out the slots are halved, which changes no result.
        """
        todo = [run for run in runs if self.plan.step(rung, run.total) not in run.losses]
        while not all(run.ended for run in todo):
            k = min(self.slots, len(runs))
            try:
                self._train(k, todo[:k], rung, progress)
                todo = todo[k:]
            except torch.OutOfMemoryError:
                if k == 1:
                    raise
                self.__exit__()
                torch.cuda.empty_cache()
                self.slots = k // 2
                self.tell(f"Memory ran out with {k} slots: {self.slots} are trained at a time.")

    def _train(self, k: int, runs: list[Run], rung: int, progress: Progress) -> None:
        plan = self.plan
        self._put(k, runs, [plan.step(rung, run.total) for run in runs])
        self._advance(progress)

        rested = self.so_far(runs)
        for slot, run in enumerate(rested):  # the copies
            if run.ended is None and (more := plan.cooldown_steps(rung, run.total)):
                ends = {"epochs": None, "steps": run.taken + more, "schedule": "linear"}
                copy = replace(run.recipe.training, **ends)
                state = replace(self.training.state(slot), config=copy, until=None)
                self.training.go_on(slot, state)
        self._advance(progress)
        losses = self.training.evaluate(self.validation, self._rows())
        for run, end, loss in zip(runs, rested, losses, strict=False):
            run.curve, run.ended, run.position = end.curve, end.ended, end.position
            if run.ended is None and not math.isfinite(loss):
                run.ended = f"Step {run.taken}: the validation loss is {loss}"
                run.position = None
            if run.ended is None:
                run.losses[run.taken] = loss

    def _advance(self, progress: Progress) -> None:

        def recorded() -> int:
            return sum(len(slot.losses) for slot in self.training.trainings if slot)

        ticks, done = TICKS.get(self.device.type, 64), recorded()
        while self.training.advance(ticks):
            progress(recorded() - done)
            done = recorded()

    def so_far(self, runs: list[Run]) -> list[Run]:
        """Runs, those in slots as copies; none within a step or a cooldown."""
        pairs = list(zip(self._runs, self.training.trainings, strict=False))
        if any(s and (s.micro or s.config is not run.recipe.training) for run, s in pairs):
            return []
        copies = [replace(run, position=None) for run in self._runs]
        for copy, (_, slot) in zip(copies, pairs, strict=True):
            if slot:
                copy.curve = copy.curve + slot.losses
                copy.ended = slot.ended
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

    def evaluate(self, runs: list[Run], data: gpt2.Dataset) -> list[float]:
        """The losses of runs on other data."""
        losses, k = list[float](), min(self.slots, len(runs))
        for wave in (runs[i : i + k] for i in range(0, len(runs), k)):
            self._put(k, wave, [run.taken for run in wave])
            losses += self.training.evaluate(data, self._rows())[: len(wave)]
        return losses

    @contextmanager
    def carried(self, run: Run) -> Iterator[gpt2.GPT2]:
        """Yield the model with the run's adapter."""
        self._put(1, [run], [run.taken])
        assert self.population
        with self.population.adapter(0):
            yield self.model

    def check_memory(self) -> None:
        """Raise if memory lacks, measured by a step of one slot."""
        usual = self.plan.usual
        total = gpt2.total_steps(self.data, usual.training)
        self._put(1, [Run(trial=DEFAULT, recipe=usual, total=total)], [1])
        if (free := available(self.device)) is None:
            return
        each, here = self._measured() / 2**30, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.__exit__()
        fit = int(free * SPARE / here // each)
        slots = min(self.slots, -(-self.plan.trials // processes.size()))
        if slots > fit:
            remedy = f"--slots {fit}" if fit else "a smaller train_batch_size or a smaller r"
            of = f" of each of {here} processes" if here > 1 else ""
            raise ValueError(
                f"{slots:,} slots{of} take about {here * slots * each:,.2f} GiB, and {free:,.2f} "
                f"are free: about {fit:,} fit. So give {remedy}."
            )

    def _measured(self) -> int:
        """Bytes of a slot, with its backward pass."""
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

    def _put(self, k: int, runs: list[Run], until: list[int]) -> None:
        """Put a run into each slot, where it is."""
        if self.population is None or len(self.population) != k:
            self.__exit__()
            self.population = lora.Population(self.model, k, self.room)
            of = (self.model, self.population, self.data, self.plan.usual.training)
            self.training = PopulationTraining(*of)
        slots, training, self._runs = self.population, self.training, runs
        training.trainings[:] = [None] * k
        for slot, (run, step) in enumerate(zip(runs, until, strict=True)):
            if run.ended is not None:
                continue
            slots.draw(slot, run.recipe.adapter)
            how: Any = {"config": run.recipe.training, "ratios": {"B": run.recipe.b_ratio}}
            how |= {"taken": run.taken, "until": max(step, 1)}
            if run.position is not None:
                flat, *moments = run.position
                how["moments"] = torch.stack(moments)
                with torch.no_grad():
                    slots.flat[slot] = flat.to(slots.flat.device)
            if run.taken < run.total:
                training.go_on(slot, Slot(data=self.data, occupant=slots.take(slot), **how))


def available(device: torch.device) -> float | None:
    """GiB free for a CPU, on Linux."""
    if device.type != "cpu":
        return None
    free: list[int] = []
    with suppress(OSError, IndexError):
        text = Path("/proc/meminfo").read_text()
        free.append(int(text.partition("MemAvailable:")[2].split()[0]) * 1024)
    with suppress(OSError, ValueError):  # no limit
        limit, used = (Path(f"/sys/fs/cgroup/memory.{n}").read_text() for n in ("max", "current"))
        free.append(int(limit) - int(used))
    return min(free) / 2**30 if free else None
