"""The search: proposals, rungs, finals, test."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import gpt2
from gpt2.training.distributed import gathered
from gpt2.training.scores import Scorer

from ..runs import scores
from ..runs.processes import rank, size
from . import sampler
from .checkpoint import Checkpoint
from .halving import Plan
from .trials import DEFAULT, Recipe, Run, Trial, Values
from .waves import Waves

Scored = dict[str, Any]


@dataclass(kw_only=True)
class Search:
    """A search's state."""

    waves: Waves
    checkpoint: Checkpoint
    progress: Callable[[int], None] = lambda steps: None  # adapter-steps
    tell: Callable[[str], None] = lambda line: None
    values: list[Values] = field(default_factory=list[Values])  # of each trial
    runs: list[Run] = field(default_factory=list[Run])  # of each trial, first seed
    rungs: list[list[int]] = field(default_factory=list[list[int]])  # trials by rung
    # Runs under other seeds, and test losses by seed; of the default, too.
    again: dict[Trial, list[Run]] = field(default_factory=dict[Trial, list[Run]])
    tested: dict[Trial, list[float]] = field(default_factory=dict[Trial, list[float]])
    # Scores of finalists and the default, all seeds together.
    score: str | None = None
    score_prompts: int | None = None
    by_score: bool = False
    scored: dict[Trial, Scored] = field(default_factory=dict[Trial, Scored])

    @property
    def plan(self) -> Plan:
        """What is searched, and how."""
        return self.waves.plan

    def search(self, test: gpt2.Dataset | None) -> None:
        """Run it to its end; raise where every trial ended early."""
        for rung in range(self.plan.rungs):
            self._rung(rung)
            if not self.survivors_of(rung):
                ended = next(run.ended for run in self.runs if run.ended)
                raise RuntimeError(f"No trial came to the end of rung {rung + 1}: {ended}")
        self._finals()
        self._score()
        self._test(test)

    def _rung(self, rung: int) -> None:
        plan = self.plan
        trials = self.survivors_of(rung - 1) if rung else [*range(plan.trials)]
        self._begin(f"rung {rung + 1}", len(trials))
        self.rungs.append(trials)
        learns = rung == 0 and plan.sampler == "tpe"
        for number, part in enumerate(self._waves(trials) if learns else [trials], 1):
            if rung == 0:
                self._propose(len(part), number)
            runs = {n: self.runs[n] for n in part}
            self._train(f"rung-{rung + 1}", runs, rung, number)
        self._retire(rung)

    def _propose(self, n: int, part: int) -> None:
        plan, seed = self.plan, self.plan.usual.training.seed
        how = {"sampler": plan.sampler, "seed": seed * 1_000_003 + part - 1}
        for values in sampler.propose(plan.space, n, self.known(), **how):
            recipe = plan.usual.varied(values)
            self.runs.append(self._run(len(self.runs), recipe, seed))
            self.values.append(values)

    def _retire(self, rung: int) -> None:
        """Free the weights of trials that a rung drops."""
        best = {*self.survivors_of(rung)}
        for n in self.rungs[rung][: len(self.runs)]:
            if n not in best and math.isfinite(self._at(n, rung)):
                self.runs[n].position = None

    def survivors_of(self, rung: int) -> list[int]:
        """The trials that a rung keeps, the best first."""
        losses = {n: self._at(n, rung) for n in self.rungs[rung][: len(self.runs)]}
        best = self.plan.survivors(losses, rung)
        return best[: self.plan.finalists] if rung + 1 == self.plan.rungs else best

    def _finals(self) -> None:
        plan, finalists = self.plan, self.finalists
        seeds = [plan.usual.training.seed + i for i in range(plan.seeds)]
        for n in finalists:
            self.again[n] = [self._run(n, self.runs[n].recipe, seed) for seed in seeds[1:]]
        self.again[DEFAULT] = [self._run(DEFAULT, plan.usual, seed) for seed in seeds]
        runs = dict(enumerate(run for repeated in self.again.values() for run in repeated))
        self._begin("finals", len(finalists))
        self._train("finals", runs, plan.rungs - 1)

    def _score(self) -> None:
        if self.score is None:
            return
        of = self.waves.validation, scores.named(self.score), self.score_prompts
        scorer = Scorer(*of)
        for trial, repeated in self._shared([*self.finalists, DEFAULT]).items():
            texts = list[str]()
            for run in repeated:
                if run.position:
                    with self.waves.carried(run) as model:
                        texts += scorer.texts(model)
            if texts:
                references = scorer.references * (len(texts) // len(scorer.references))
                self.scored[trial] = scores.scored(self.score, texts, references)

    def _shared(self, trials: list[Trial]) -> dict[Trial, list[Run]]:
        """Trials' runs by seed, their weights in every process."""
        of = {trial: self.seeds_of(trial) for trial in trials}
        runs = [run for repeated in of.values() for run in repeated]
        for positions in gathered([run.position for run in runs]):
            for run, position in zip(runs, positions, strict=True):
                run.position = run.position or position
        return of

    def _test(self, data: gpt2.Dataset | None) -> None:
        both = self._shared([self.winner, DEFAULT])
        if data is not None and not rank():
            for trial, repeated in both.items():
                if all(run.position for run in repeated):
                    self.tested[trial] = self.waves.evaluate(repeated, data)

    def _begin(self, stage: str, trials: int) -> None:
        losses = [run.loss for run in self.runs if math.isfinite(run.loss)]
        best = f" · best {min(losses):.4f}" if losses else ""
        self.tell(f"{stage} · {trials} trials{best}")

    def _waves(self, numbers: list[int]) -> list[list[int]]:
        each = [[n for n in numbers if n % size() == process] for process in range(size())]
        most, k = max(map(len, each)), self.plan.slots
        return [sorted(n for mine in each for n in mine[i : i + k]) for i in range(0, most, k)]

    def _train(self, stage: str, runs: Mapping[int, Run], rung: int, first: int = 1) -> None:
        """Train runs to a rung's end, wave by wave, and share the results."""
        for number, wave in enumerate(self._waves([*runs]), first):
            name = f"{stage}-wave-{number}" + f"-of-process-{rank()}" * (size() > 1)
            self._wave(name, [runs[n] for n in _mine(wave)], rung)
        mine = {n: (runs[n].curve, runs[n].losses, runs[n].ended) for n in _mine(runs)}
        for results in gathered(mine):
            for n, (curve, losses, ended) in results.items():
                runs[n].curve, runs[n].losses, runs[n].ended = curve, losses, ended

    def _wave(self, name: str, runs: list[Run], rung: int) -> None:
        self.checkpoint.read(name, runs)

        def progress(steps: int) -> None:
            self.checkpoint.write_if_due(name, lambda: self.waves.so_far(runs))
            self.progress(steps * size())  # of all processes

        self.waves.train(runs, rung, progress)
        self._retire(rung)
        self.checkpoint.write(name, runs)

    @property
    def finalists(self) -> list[int]:
        """The last rung's best, the best first."""
        return self.survivors_of(self.plan.rungs - 1)

    @property
    def winner(self) -> int:
        """The finalist of the highest score or the lowest mean loss."""
        if self.by_score and self.scored:
            finalists = [n for n in self.finalists if n in self.scored]
            return max(finalists, key=lambda n: self.scored[n]["value"])
        means = {n: fmean(self.losses_of(n)) for n in self.finalists}
        return min(means, key=lambda n: (not math.isfinite(means[n]), means[n], n))

    def seeds_of(self, trial: Trial) -> list[Run]:
        """A trial's runs by seed."""
        first = [] if isinstance(trial, str) else [self.runs[trial]]
        return [*first, *self.again.get(trial, [])]

    def losses_of(self, trial: Trial) -> list[float]:
        """Their validation losses."""
        return [run.loss for run in self.seeds_of(trial)]

    def by_rung(self, trial: int) -> dict[int, float]:
        """A trial's losses by rung, from 1."""
        losses = {r + 1: self._at(trial, r) for r in range(len(self.rungs))}
        return {rung: loss for rung, loss in losses.items() if math.isfinite(loss)}

    def known(self) -> list[sampler.Known]:
        """All trials, for the sampler."""
        rungs, known = self.plan.rungs, list[sampler.Known]()
        for n, (values, run) in enumerate(zip(self.values, self.runs, strict=True)):
            losses = {} if run.ended else self.by_rung(n)
            known.append((values, losses, rungs in losses))
        return known

    @property
    def done(self) -> int:
        """Adapter-steps taken, with those of copies."""
        again = [run for runs in self.again.values() for run in runs]
        judged = ((run, rung) for n, run in enumerate(self.runs) for rung in self.by_rung(n))
        copies = [self.plan.cooldown_steps(rung - 1, run.total) for run, rung in judged]
        return sum(run.taken for run in [*self.runs, *again]) + sum(copies)

    def _at(self, trial: int, rung: int) -> float:
        run = self.runs[trial]
        return run.losses.get(self.plan.step(rung, run.total), math.nan)

    def _run(self, trial: Trial, recipe: Recipe, seed: int) -> Run:
        total = gpt2.total_steps(self.waves.data, recipe.training)
        return Run(trial=trial, recipe=recipe.seeded(seed), total=total)


def _mine(numbers: Iterable[int]) -> list[int]:
    return [n for n in numbers if n % size() == rank()]
