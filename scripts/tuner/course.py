"""The course of a search: proposals, rungs, finalists with more seeds, and the last data.

It knows of no options, folders or consoles, so that anything may drive it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import gpt2

from ..runs.recipe import Recipe
from . import noise, proposals
from .plan import Plan
from .runs import DEFAULT, Run
from .space import Values
from .team import Team
from .wave_files import WaveFiles
from .waves import Waves

Progress = Callable[["Course", int], None]


@dataclass(kw_only=True)
class Course:
    """A search and how far it is.

    Attributes:
        values: of each trial.
        runs: of each trial under the first seed.
        rungs: the numbers of the trials that began each rung.
        again: runs under other seeds, by trial; all of the usual configuration's.
        tested: losses on the last data by trial, seed by seed.
    """

    plan: Plan
    waves: Waves
    files: WaveFiles | None = None
    progress: Progress = lambda course, steps: None
    values: list[Values] = field(default_factory=list[Values])
    runs: list[Run] = field(default_factory=list[Run])
    rungs: list[list[int]] = field(default_factory=list[list[int]])
    again: dict[int | str, list[Run]] = field(default_factory=dict[int | str, list[Run]])
    tested: dict[int | str, list[float]] = field(default_factory=dict[int | str, list[float]])
    alive: int = 0
    team: Team = field(default_factory=Team)

    def search(self, test: gpt2.Dataset | None) -> None:
        """Run it to its end.

        Raises:
            RuntimeError: every trial came to an end of its own.
        """
        for rung in range(self.plan.halving.rungs):
            self._rung(rung)
            if not self._order(rung):
                ended = next(run.ended for run in self.runs if run.ended)
                raise RuntimeError(f"No trial came to the end of rung {rung + 1}: {ended}")
        self._finals()
        self._fetch([*self.seeds_of(self.winner), *self.seeds_of(DEFAULT)])
        if test is not None and self.team.rank == 0:
            for trial in (self.winner, DEFAULT):
                runs = self.seeds_of(trial)
                if all(run.place for run in runs):
                    k = min(self.plan.slots, len(runs))
                    self.tested[trial] = self.waves.evaluate(k, runs, test)

    @property
    def best(self) -> float:
        """The lowest loss so far on the selection data, at whatever step."""
        return min((run.loss for run in self.runs if math.isfinite(run.loss)), default=math.nan)

    @property
    def total(self) -> int:
        """Adapter-steps of all, as far as is known: a trial that is not proposed yet counts as one
        that is."""
        halving, usual = self.plan.halving, self._total(self.plan.usual)
        mean = fmean([run.total for run in self.runs] or [usual])
        again = self.plan.finalists * (self.plan.seeds - 1) * mean + self.plan.seeds * usual
        found = sum(run.total for own in self.again.values() for run in own) or again
        for rung, alive in enumerate(halving.alive):
            known = self.rungs[rung] if rung < len(self.rungs) else []
            found += sum(halving.steps(rung, self.runs[n].total) for n in known)
            found += max(0, alive - len(known)) * halving.steps(rung, int(mean))
        return int(found)

    @property
    def done(self) -> int:
        """Adapter-steps taken, those of the copies that were judged included."""
        halving, again = self.plan.halving, [run for own in self.again.values() for run in own]
        judged = ((run, rung) for n, run in enumerate(self.runs) for rung in self.by_rung(n))
        copies = [halving.cooldown_steps(rung - 1, run.total) for run, rung in judged]
        return sum(run.taken for run in [*self.runs, *again]) + sum(copies)

    @property
    def finalists(self) -> list[int]:
        """The best of the last rung, the best first."""
        return self._going_on(self.plan.halving.rungs - 1)

    @property
    def winner(self) -> int:
        """The finalist whose mean loss over the seeds is the lowest."""
        means = {n: fmean(self.losses_of(n)) for n in self.finalists}
        return min(means, key=lambda n: (not math.isfinite(means[n]), means[n], n))

    @property
    def alike(self) -> list[int]:
        """The finalists that cannot be told apart from the winner."""
        return noise.alike(self.winner, {n: self.losses_of(n) for n in self.finalists})

    def seeds_of(self, trial: int | str) -> list[Run]:
        """The runs of a finalist, or of the usual configuration, seed by seed."""
        first = [] if isinstance(trial, str) else [self.runs[trial]]
        return [*first, *self.again.get(trial, [])]

    def losses_of(self, trial: int | str) -> list[float]:
        """Their losses on the selection data."""
        return [run.loss for run in self.seeds_of(trial)]

    def _order(self, rung: int) -> list[int]:
        losses = {n: self._at(n, rung) for n in self.rungs[rung]}
        return self.plan.halving.going_on(losses, rung)

    def _going_on(self, rung: int) -> list[int]:
        """The best so far of a rung: as many as begin the next, or after the last run again."""
        is_last = rung + 1 == self.plan.halving.rungs
        return self._order(rung)[: self.plan.finalists if is_last else None]

    def _at(self, trial: int, rung: int) -> float:
        """The loss with which a trial came to the end of a rung."""
        run = self.runs[trial]
        return run.losses.get(self.plan.halving.step(rung, run.total), math.nan)

    def _rung(self, rung: int) -> None:
        halving = self.plan.halving
        self.rungs.append([] if rung == 0 else self._order(rung - 1))
        numbers = range(halving.trials) if rung == 0 else self.rungs[rung]
        self.alive = len(numbers)
        k, waves = self.team.waves(numbers, self.plan.slots)
        for wave, some in enumerate(waves):
            name = f"rung-{rung + 1}-wave-{wave + 1}"
            if rung == 0:
                self._propose(wave, len(some), name)
                self.rungs[0] += some
            runs = {n: self.runs[n] for n in some}
            values = [self.values[n] for n in some] if rung == 0 else None
            self._wave(name, k, runs, rung, values, lambda run: run.trial in self._going_on(rung))
            if self.plan.sampler == "tpe" and rung == 0:  # what it proposes depends on all
                self._tell(runs)
        self._tell({n: self.runs[n] for n in numbers})
        for n in {*numbers} - {*self._going_on(rung)}:  # some were overtaken in later waves
            self.runs[n].place = None

    def _propose(self, wave: int, n: int, name: str) -> None:
        """Add so many trials: those of a wave that was trained before, or new ones."""
        plan = self.plan
        values = self.files.values(self.team.own(name)) if self.files else None
        if values is None and plan.sampler == "random":  # whatever the slots
            values = plan.at_random[len(self.values) : len(self.values) + n]
        elif values is None:
            known = [self._known(i, 1) for i in range(len(self.runs))]
            how = {"sampler": plan.sampler, "seed": plan.seed, "wave": wave}
            values = proposals.propose(plan.space, n, known, **how)
        for own in values:
            recipe = plan.usual.varied(own).seeded(plan.seed)
            self.runs.append(Run(trial=len(self.runs), recipe=recipe, total=self._total(recipe)))
            self.values.append(own)

    def known(self) -> list[proposals.Known]:
        """All trials as Optuna's study has them."""
        return [self._known(n, self.plan.halving.rungs) for n in range(len(self.runs))]

    def by_rung(self, trial: int) -> dict[int, float]:
        """The losses of a trial, by the rungs that it came to the end of, from 1."""
        found = {r + 1: self._at(trial, r) for r in range(len(self.rungs))}
        return {rung: loss for rung, loss in found.items() if math.isfinite(loss)}

    def _known(self, trial: int, rungs: int) -> proposals.Known:
        reached = {} if self.runs[trial].ended else self.by_rung(trial)
        losses = {rung: loss for rung, loss in reached.items() if rung <= rungs}
        whole = self.plan.halving.rungs in losses
        return proposals.Known(values=self.values[trial], losses=losses, complete=whole)

    def _finals(self) -> None:
        """Run the finalists under the other seeds, and the usual configuration under all."""
        usual, found = self.plan.usual, list[Run]()
        recipes: list[tuple[int | str, Recipe, Sequence[int]]] = [
            (n, self.runs[n].recipe, self.plan.all_seeds[1:]) for n in self.finalists
        ]
        for trial, recipe, seeds in [*recipes, (DEFAULT, usual, self.plan.all_seeds)]:
            self.again[trial] = [
                Run(trial=trial, recipe=recipe.seeded(seed), total=self._total(recipe))
                for seed in seeds
            ]
            found += self.again[trial]
        self.alive, last = len(self.finalists), self.plan.halving.rungs - 1
        k, waves = self.team.waves(range(len(found)), self.plan.slots)
        for wave, some in enumerate(waves):
            runs = {i: found[i] for i in some}
            self._wave(f"finals-wave-{wave + 1}", k, runs, last, None, lambda run: not run.ended)
        self._tell(dict(enumerate(found)))

    def _wave(
        self,
        name: str,
        k: int,
        all_runs: Mapping[int, Run],
        rung: int,
        values: list[Values] | None,
        keeps: Callable[[Run], bool],
    ) -> None:
        """Train runs, or read what they came to when they were trained before."""
        runs, name = [all_runs[i] for i in all_runs if self.team.has(i)], self.team.own(name)
        if not runs or (self.files and self.files.read(name, runs)):
            self.progress(self, 0)
        else:
            look = self.files.under_way(name, self.waves, runs) if self.files else lambda: None

            def progress(steps: int) -> None:
                look()
                self.progress(self, steps * self.team.size)  # the others take as many

            self.waves.train(k, runs, self.plan.halving, rung, progress)
            for run in runs:
                run.place = run.place if keeps(run) else None
            if self.files:
                self.files.write(name, runs, values)

    def _tell(self, runs: Mapping[int, Run]) -> None:
        """Each process learns what the runs of the others came to."""
        own = {i: (run.curve, run.losses, run.ended) for i, run in runs.items() if self.team.has(i)}
        for found in self.team.gather(own):
            for i, (curve, losses, ended) in found.items():
                runs[i].curve, runs[i].losses, runs[i].ended = curve, losses, ended

    def _fetch(self, runs: Sequence[Run]) -> None:
        """Each process gets where these runs are."""
        for places in self.team.gather([run.place for run in runs]):
            for run, place in zip(runs, places, strict=True):
                run.place = run.place or place

    def _total(self, recipe: Recipe) -> int:
        return gpt2.total_steps(self.waves.learnt, recipe.training)
