"""The search: proposals, rungs in which the worse retire, finalists with more seeds, the test.

It knows of no options and no console, so that anything may drive it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean

import gpt2

from ..runs import processes
from . import sampler
from .checkpoint import Checkpoint
from .halving import Halving
from .space import Space
from .trials import DEFAULT, Recipe, Run, Values
from .waves import Waves

MOST = 100_000  # trials, which all are held in memory


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is searched, and how."""

    space: Space  # what varies
    usual: Recipe  # what does not; it is trained too, and takes no part
    halving: Halving
    slots: int  # trainings at a time
    sampler: str  # "random" or "tpe"
    finalists: int  # trials of the last rung that run again
    seeds: int  # of each finalist, the first being that of all trials

    @property
    def seed(self) -> int:
        """Of all trials in the rungs, and of the proposals."""
        return self.usual.training.seed

    @cached_property
    def at_random(self) -> Sequence[Values]:
        """Of all trials at once, where none depends on another."""
        how = {"sampler": "random", "seed": self.seed * 1_000_003}
        return sampler.propose(self.space, self.halving.trials, [], **how)

    def checked(self, train: gpt2.Dataset) -> Plan:
        """The plan, whose copies do not cool down where no rate falls; or a ValueError."""
        trials, training = self.halving.trials, self.usual.training
        if self.sampler == "tpe" and trials <= self.slots:
            raise ValueError(
                f"tpe learns from wave to wave, and all {trials} trials fit in one of "
                f"{self.slots} slots: give fewer slots, more trials, or take random."
            )
        cooldown = 0 if training.schedule == "constant" else self.halving.cooldown
        halving, shortest = replace(self.halving, cooldown=cooldown), self.usual
        for name in {"steps", "epochs"} & {*self.space.axes}:
            shortest = shortest.varied({name: int(self.space.ends(name, 1)[0])})
        least = gpt2.total_steps(train, shortest.training)
        faults = halving.faults(least, self.finalists)
        if not faults and halving.cooldown_steps(0, least):
            first, warmup = halving.step(0, least), training.warmup_steps or 0
            if warmup >= first:  # no copy's rate would fall
                faults = [f"the first ends after {first:,} steps and the warm-up takes {warmup:,}"]
        if faults:
            raise ValueError(f"The rungs do not fit: {'; '.join(faults)}.")
        return replace(self, halving=halving)

    def steps(self, total: int) -> int:
        """Adapter-steps of all, if each training has so many."""
        again = self.finalists * (self.seeds - 1) + self.seeds
        rungs = enumerate(self.halving.alive)
        return again * total + sum(n * self.halving.steps(rung, total) for rung, n in rungs)

    def message(self) -> str:
        """What the search is going to do."""
        alive = "/".join(map(str, self.halving.alive))
        shares = [100 / self.halving.keep**n for n in reversed(range(self.halving.rungs))]
        percent = "/".join(f"{share:.3g}" for share in shares)
        return (
            f"{alive} trials train to {percent} % of their schedules, {self.slots} at a time; then "
            f"{self.finalists} finalists and the default configuration over {self.seeds} seeds."
        )


@dataclass(kw_only=True)
class Search:
    """A search and how far it is."""

    plan: Plan
    waves: Waves
    checkpoint: Checkpoint | None = None
    progress: Callable[[int], None] = lambda steps: None  # gets the adapter-steps that were taken
    tell: Callable[[str], None] = lambda line: None  # gets a line where a stage begins
    values: list[Values] = field(default_factory=list[Values])  # of each trial
    runs: list[Run] = field(default_factory=list[Run])  # of each trial under the first seed
    rungs: list[list[int]] = field(default_factory=list[list[int]])  # the trials that began each
    # Runs under other seeds, and losses on the test data seed by seed; of the default too.
    again: dict[int | str, list[Run]] = field(default_factory=dict[int | str, list[Run]])
    tested: dict[int | str, list[float]] = field(default_factory=dict[int | str, list[float]])

    def search(self, test: gpt2.Dataset | None) -> None:
        """Run it to its end; a RuntimeError where every trial ended early."""
        for rung in range(self.plan.halving.rungs):
            self._rung(rung)
            if not self.going_on(rung):
                ended = next(run.ended for run in self.runs if run.ended)
                raise RuntimeError(f"No trial came to the end of rung {rung + 1}: {ended}")
        self._finals()
        self._test(test)

    def _rung(self, rung: int) -> None:
        """Train the trials of a rung, wave by wave; those that are not among the best retire."""
        plan, first = self.plan, rung == 0
        numbers = [*range(plan.halving.trials)] if first else self.going_on(rung - 1)
        self._begin(f"rung {rung + 1}", len(numbers))
        self.rungs.append([] if first else numbers)
        k, waves = self._waves(numbers)
        for wave, some in enumerate(waves):
            name = f"rung-{rung + 1}-wave-{wave + 1}"
            if first:
                self._propose(wave, len(some), name)
                self.rungs[0] += some
            runs = {n: self.runs[n] for n in some}
            values = [self.values[n] for n in some] if first else None
            self._wave(name, k, runs, rung, values, self._retire)
            if first and plan.sampler == "tpe":  # what it proposes depends on all
                self._share(runs)
        self._share({n: self.runs[n] for n in numbers})
        self._retire(rung)

    def _begin(self, stage: str, trials: int) -> None:
        losses = [run.loss for run in self.runs if math.isfinite(run.loss)]
        best = f" · best {min(losses):.4f}" if losses else ""  # none yet
        self.tell(f"{stage} · {trials} trials{best}")

    def _retire(self, rung: int) -> None:
        """Let go of the positions of those that are not among the best so far of a rung."""
        best = {*self.going_on(rung)}
        for n in self.rungs[rung]:
            if n not in best and math.isfinite(self._at(n, rung)):
                self.runs[n].position = None

    def going_on(self, rung: int) -> list[int]:
        """The trials of a rung that go on, as far as is known, the best first."""
        losses = {n: self._at(n, rung) for n in self.rungs[rung]}
        best = self.plan.halving.going_on(losses, rung)
        return best[: self.plan.finalists] if rung + 1 == self.plan.halving.rungs else best

    def _propose(self, wave: int, n: int, name: str) -> None:
        """Add n trials: those of a wave of which something is kept, or new ones."""
        plan = self.plan
        values = self.checkpoint.values(_own(name)) if self.checkpoint else None
        if values is None and plan.sampler == "random":  # whatever the slots
            values = plan.at_random[len(self.values) : len(self.values) + n]
        elif values is None:
            seed = plan.seed * 1_000_003 + wave
            how = {"sampler": plan.sampler, "seed": seed}
            values = sampler.propose(plan.space, n, self.known(), **how)
        for number, own in enumerate(values, len(self.runs)):
            self.runs.append(self._run(number, plan.usual.varied(own), plan.seed))
            self.values.append(own)

    def _finals(self) -> None:
        """Run the finalists under the other seeds, and the default configuration under all."""
        plan, finalists = self.plan, self.finalists
        seeds = [plan.seed + i for i in range(plan.seeds)]
        for n in finalists:
            self.again[n] = [self._run(n, self.runs[n].recipe, seed) for seed in seeds[1:]]
        self.again[DEFAULT] = [self._run(DEFAULT, plan.usual, seed) for seed in seeds]
        runs = [run for own in self.again.values() for run in own]
        self._begin("finals", len(finalists))
        k, waves = self._waves(range(len(runs)))
        for wave, some in enumerate(waves):
            own, last = {i: runs[i] for i in some}, plan.halving.rungs - 1
            self._wave(f"finals-wave-{wave + 1}", k, own, last, None, lambda rung: None)
        self._share(dict(enumerate(runs)))

    def _test(self, data: gpt2.Dataset | None) -> None:
        """Evaluate the winner and the default configuration on what decided nothing."""
        both = {trial: self.seeds_of(trial) for trial in (self.winner, DEFAULT)}
        runs = [run for own in both.values() for run in own]
        for positions in processes.gathered([run.position for run in runs]):
            for run, position in zip(runs, positions, strict=True):
                run.position = run.position or position
        if data is not None and not processes.rank():
            for trial, own in both.items():
                if all(run.position for run in own):
                    self.tested[trial] = self.waves.evaluate(own, data)

    def _waves(self, numbers: Sequence[int]) -> tuple[int, list[list[int]]]:
        """How many slots are needed, and the numbers wave by wave; each stays with its process."""
        size = processes.size()
        each = [[n for n in numbers if n % size == rank] for rank in range(size)]
        most = max(map(len, each))
        k = min(self.plan.slots, most)
        return k, [sorted(n for own in each for n in own[i : i + k]) for i in range(0, most, k)]

    def _wave(
        self,
        name: str,
        k: int,
        all_runs: Mapping[int, Run],
        rung: int,
        values: Sequence[Values] | None,
        judge: Callable[[int], None],
    ) -> None:
        """Train this process's runs of a wave, as far as an earlier process did not."""
        kept, name, runs = self.checkpoint, _own(name), [*_mine(all_runs).values()]
        if kept:
            kept.read(name, runs)

        def progress(steps: int) -> None:
            if kept:
                kept.write_if_due(name, lambda: self.waves.so_far(runs), values)
            self.progress(steps * processes.size())  # the others take as many

        self.waves.train(k, runs, self.plan.halving, rung, progress)
        judge(rung)
        if kept:
            kept.write(name, runs, values)

    def _share(self, runs: Mapping[int, Run]) -> None:
        """Each process learns what the runs of the others came to."""
        own = {i: (r.curve, r.losses, r.ended) for i, r in _mine(runs).items()}
        for results in processes.gathered(own):
            for i, (curve, losses, ended) in results.items():
                runs[i].curve, runs[i].losses, runs[i].ended = curve, losses, ended

    @property
    def finalists(self) -> list[int]:
        """The best of the last rung, the best first."""
        return self.going_on(self.plan.halving.rungs - 1)

    @property
    def winner(self) -> int:
        """The finalist whose mean loss over the seeds is the lowest."""
        means = {n: fmean(self.losses_of(n)) for n in self.finalists}
        return min(means, key=lambda n: (not math.isfinite(means[n]), means[n], n))

    def seeds_of(self, trial: int | str) -> list[Run]:
        """The runs of a finalist, or of the default configuration, seed by seed."""
        first = [] if isinstance(trial, str) else [self.runs[trial]]
        return [*first, *self.again.get(trial, [])]

    def losses_of(self, trial: int | str) -> list[float]:
        """Their losses on the validation data."""
        return [run.loss for run in self.seeds_of(trial)]

    def by_rung(self, trial: int) -> dict[int, float]:
        """The losses of a trial, by the rungs that it came to the end of, from 1."""
        losses = {r + 1: self._at(trial, r) for r in range(len(self.rungs))}
        return {rung: loss for rung, loss in losses.items() if math.isfinite(loss)}

    def known(self) -> list[sampler.Known]:
        """All trials as Optuna's study has them."""
        rungs, ended = self.plan.halving.rungs, [run.ended for run in self.runs]
        losses = [{} if ended[n] else self.by_rung(n) for n in range(len(self.runs))]
        pairs = zip(self.values, losses, strict=True)
        return [sampler.Known(values, own, rungs in own) for values, own in pairs]

    def _at(self, trial: int, rung: int) -> float:
        """The loss with which a trial came to the end of a rung."""
        run = self.runs[trial]
        return run.losses.get(self.plan.halving.step(rung, run.total), math.nan)

    def _run(self, trial: int | str, recipe: Recipe, seed: int) -> Run:
        total = gpt2.total_steps(self.waves.data, recipe.training)
        return Run(trial=trial, recipe=recipe.seeded(seed), total=total)

    @property
    def done(self) -> int:
        """Adapter-steps taken, those of the copies that were judged included."""
        halving, again = self.plan.halving, [run for own in self.again.values() for run in own]
        judged = ((run, rung) for n, run in enumerate(self.runs) for rung in self.by_rung(n))
        copies = [halving.cooldown_steps(rung - 1, run.total) for run, rung in judged]
        return sum(run.taken for run in [*self.runs, *again]) + sum(copies)


def _own(name: str) -> str:
    """The name of a wave's file, of which each process has its own."""
    return name if processes.size() == 1 else f"{name}-of-process-{processes.rank()}"


def _mine(runs: Mapping[int, Run]) -> dict[int, Run]:
    """The runs that are this process's."""
    return {i: run for i, run in runs.items() if i % processes.size() == processes.rank()}
