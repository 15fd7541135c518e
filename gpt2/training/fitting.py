"""A run with validation, early stopping and snapshots."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from gpt2.data.dataset import Dataset
from gpt2.files import is_sharded, listed
from gpt2.training import distributed, snapshots
from gpt2.training.config import RunConfig, TrainConfig
from gpt2.training.evaluation import evaluate
from gpt2.training.loop import StepRecord, Training
from gpt2.training.losses import check_readable
from gpt2.training.scores import Score, Scorer
from gpt2.training.step import Groups, Weights


def fit(
    model: nn.Module,
    data: Dataset,
    config: TrainConfig,
    *,
    groups: Groups | None = None,
    validation: Dataset | None = None,
    run: RunConfig | None = None,
    resume: bool = False,
    score: Score | None = None,
    prompts: int | None = None,
    choose_by: str = "loss",
) -> Fit:
    """Train as `gpt2.train` does; evaluate, keep the best, stop early, save and resume.

    Iterate the result: `for record in gpt2.fit(...)`. The model is evaluated before the first
    step too. At the end it has the weights of the best evaluation. A resumed run begins with the
    record of the step that the snapshot was taken after.

    Args:
        model, data, config, groups: as for `gpt2.train`.
        validation: examples that are only read; without them the last weights are the result.
        run: when to evaluate, to stop and to save.
        resume: go on, bit for bit on a CPU, from the snapshot in the run's folder.
        score, prompts: as for `gpt2.evaluate`.
        choose_by: the best has the lowest "loss" or the highest "score"; NaN is never the best.

    Raises:
        ValueError, RuntimeError: as `gpt2.train`; a snapshot of a run of other data, base or
            options.
        FileNotFoundError: there is no snapshot to resume from.
    """
    how = {
        "score": score,
        "prompts": prompts,
        "choose_by": choose_by,
    }
    made = Fit(
        model,
        data,
        config,
        groups,
        validation,
        run or RunConfig(),
        resume,
        **how,
    )
    made._idle = True
    return made


class Fit(Training):
    """A run as `fit` makes it: its records, and what became of the model.

    Attributes:
        evaluated: the validation loss by step; 0 is before the first.
        scores: the score by step, if there is one.
        scoring: seconds that scores have taken.
        best: the weights of the best evaluation, by name; empty for none.
        start: the first step whose record comes.
        saved_step: of the last snapshot; 0 for none.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        config: TrainConfig,
        groups: Groups | None,
        validation: Dataset | None,
        run: RunConfig,
        resume: bool,
        *,
        score: Score | None = None,
        prompts: int | None = None,
        choose_by: str = "loss",
    ) -> None:
        super().__init__(model, data, config, groups)
        self.validation, self.options = validation, run
        self.evaluated: dict[int, float] = {}
        self.scores: dict[int, float] = {}
        self.scoring = 0.0
        self.choose_by = choose_by
        self.best: Weights = {}
        self.record: StepRecord | None = None  # the last
        self.last: Weights = {}  # once the run is over and the model has the best
        self.start, self.saved_step = 1, 0
        self._sharded = any(map(is_sharded, model.parameters()))
        if validation is not None:
            check_readable(model, validation)
        elif run.patience is not None or run.eval_every is not None or score is not None:
            raise ValueError("patience, eval_every and score need validation data.")
        if choose_by not in ("loss", "score") or (choose_by == "score" and score is None):
            raise ValueError(f'choose_by is "loss", or "score" with a score, not {choose_by!r}.')
        self.scorer = Scorer(validation, score, prompts) if validation and score else None
        self._facts = self.made_of(validation) if run.folder is not None else {}
        if self.scorer and self._facts:
            self._facts["chosen by"] = f"{choose_by}, {len(self.scorer.prompts)} prompts scored"
        if resume:
            self._resume()

    def _run(self) -> Generator[StepRecord]:
        self._evaluate_if_due(self.taken)
        again = [self.record] if self.record else []
        for record in chain(again, super()._run()):
            self.record = record
            self._evaluate_if_due(record.step)
            step = record.step
            yield replace(record, validation=self.evaluated.get(step), score=self.scores.get(step))
            if record.step % (self.options.save_every or math.inf) == 0:
                self._save_on_time()
            if since_lowest(self._faults.values()) >= (self.options.patience or math.inf):
                break
        if self.best and self.best_step != self.taken:
            self.last = trained(self.model)
            put(self.model, self.best)

    @property
    def best_step(self) -> int | None:
        """The first step of the best evaluation; None for none."""
        finite = {step: fault for step, fault in self._faults.items() if math.isfinite(fault)}
        return min(finite, key=finite.__getitem__, default=None)

    @property
    def _faults(self) -> dict[int, float]:
        """What is to be low, by step: the loss, or the negative score."""
        if self.choose_by == "loss":
            return self.evaluated
        return {step: -score for step, score in self.scores.items()}

    def best_weights(self) -> AbstractContextManager[None]:
        """The model has the best weights within; the last, where none is."""
        return swapped(self.model, self.best)

    def last_weights(self) -> AbstractContextManager[None]:
        """The model has the weights of the last step within."""
        return swapped(self.model, self.last)

    def save(self) -> bool:
        """Keep a snapshot; False where there is none to resume from.

        Of a sharded model call it in each process; of another the first writes.

        Raises:
            OSError: it cannot be written; that of before is as it was.
            RuntimeError: a step was not finite.
        """
        self.wait()
        writes = self._sharded or not distributed.rank()
        may = self.taken and self.stepper.whole and not self.last
        if self.options.folder is None or not may or not writes:
            return False

        best, state = self.best, self.state()
        if self._sharded:  # processes of a GPU's group meet there
            best = {n: t.to(state.parameters[n].device) for n, t in best.items()}
        around = {
            "best": best,
            "evaluated": self.evaluated,
            "scores": self.scores,
            "made_of": self._facts,
        }
        if self.record:
            around["record"] = self.record.metrics()
        snapshots.write(Path(self.options.folder), replace(state, **around))
        self.saved_step = state.step
        return True

    def _evaluate_if_due(self, step: int) -> None:
        every = self.options.eval_every or self.steps_an_epoch
        due = step % every == 0 or step == self.total
        if self.validation is None or not due or step in self.evaluated:
            return
        self.wait()
        size, autocast = self.config.batch_size, self.config.autocast
        if budget := self.config.tokens_per_batch:
            size = max(1, budget // self.validation.longest)
        loss = evaluate(self.model, self.validation, batch_size=size, autocast=autocast).loss
        fault, score = loss, math.nan
        if self.scorer:
            began = time.perf_counter()
            score = self.scorer(self.model)
            self.scoring += time.perf_counter() - began
            fault = -score if self.choose_by == "score" else loss
        if -math.inf < fault < min(filter(math.isfinite, self._faults.values()), default=math.inf):
            self.best = trained(self.model)
        if self.scorer:
            self.scores[step] = score
        self.evaluated[step] = loss  # last: an interrupt before it evaluates again

    def _save_on_time(self) -> None:
        try:
            self.save()
        except OSError as error:
            warnings.warn(
                f"The snapshot of step {self.taken} could not be written ({error}). The run goes "
                "on.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _resume(self) -> None:
        if self.options.folder is None:
            raise ValueError("To resume, name the folder: RunConfig(folder=...).")
        folder = Path(self.options.folder)
        last = snapshots.read(folder, dict(self.model.named_parameters()))
        then, now = last.made_of, self._facts
        if names := [n for n in {**then, **now} if then.get(n) != now.get(n)]:
            differs = [
                f"{n} was {then.get(n, 'not there')}, is {now.get(n, 'gone')}" for n in names
            ]
            raise ValueError(f"The run in {folder} cannot be resumed: {listed(differs)}.")

        self.resume(last)
        self.evaluated, self.best, self.saved_step = dict(last.evaluated), last.best, last.step
        self.scores = dict(last.scores)
        if known := dict(last.record):
            loss, norm = known.pop("loss"), known.pop("grad_norm")
            figures = torch.tensor([loss, norm, 0.0], dtype=torch.float64)
            began = time.perf_counter() - known.pop("seconds")
            self.record = StepRecord(**known, figures=figures, began=began)
            self.start = self.record.step


def since_lowest(losses: Iterable[float]) -> int:
    """How many losses came after the lowest."""
    least, since = math.inf, 0
    for loss in losses:
        since += 1
        if loss < least:  # NaN is never
            least, since = loss, 0
    return since


def trained(model: nn.Module) -> Weights:
    """Copies of what is trained, in the host's memory."""
    named = model.named_parameters()
    return {name: p.detach().to("cpu", copy=True) for name, p in named if p.requires_grad}


@torch.no_grad()
def put(model: nn.Module, values: Weights) -> None:
    """Give the parameters of these names these values."""
    for name, p in model.named_parameters():
        if name in values:
            p.copy_(values[name])


@contextmanager
def swapped(model: nn.Module, values: Weights) -> Generator[None]:
    """The parameters of these names have these values within."""
    before = trained(model) if values else {}
    try:
        put(model, values)
        yield
    finally:
        put(model, before)
