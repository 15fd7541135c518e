"""A run with validation, early stopping and snapshots."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
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
) -> Fit:
    """Train as `gpt2.train` does; evaluate, keep the best, stop early, save and resume.

    Iterate the result: `for record in gpt2.fit(...)`. The model is evaluated before the first
    step too. At the end it has the weights of the lowest validation loss.

    Args:
        model, data, config, groups: as for `gpt2.train`.
        validation: examples that are only read; without them the last weights are the result.
        run: when to evaluate, to stop and to save.
        resume: go on, bit for bit on a CPU, from the snapshot in the run's folder.

    Raises:
        ValueError, RuntimeError: as `gpt2.train`; a snapshot of a run of other data, base or
            options.
        FileNotFoundError: there is no snapshot to resume from.
    """
    return Fit(model, data, config, groups, validation, run or RunConfig(), resume)


class Fit(Training):
    """A run as `fit` makes it: its records, and what became of the model.

    Attributes:
        handled: steps after which the caller came back for the next.
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
    ) -> None:
        super().__init__(model, data, config, groups)
        self._used = True  # which is not warned of where it is refused
        self.validation, self.options = validation, run
        # Evaluations and the best weights: one value, which no interrupt splits.
        self._kept: tuple[Mapping[int, float], Weights] = {}, {}
        self._last: Weights = {}  # once the run is over and the model has the best
        self._record: StepRecord | None = None  # that the caller has not dealt with
        self.handled, self.saved_step, self._saved_at = 0, 0, time.monotonic()
        self._sharded = any(map(is_sharded, model.parameters()))
        self._made_of: Mapping[str, str] = {}
        if validation is not None:
            check_readable(model, validation)
        elif run.patience is not None or run.eval_every is not None:
            raise ValueError("patience and eval_every need validation data.")
        if run.folder is not None:
            self._made_of = self.made_of(validation)
        if resume:
            self._resume()
        self._used = False

    def _run(self) -> Generator[StepRecord]:
        self._evaluate_if_due(self.taken)
        steps = super()._run()
        patience = self.options.patience or math.inf
        while self._record or waited(self.evaluated.values(), self.options.min_delta) < patience:
            self._record = self._record or next(steps, None)
            if self._record is None:
                break
            step = self._record.step
            self._evaluate_if_due(step)
            loss = self.evaluated.get(step)
            yield self._record if loss is None else replace(self._record, validation=loss)
            self.handled, self._record = step, None
            self._save_if_due(step)
        steps.close()
        if self._kept[1] and self.best_step != self.taken:
            self._last = trained(self.model)
            put(self.model, self._kept[1])

    @property
    def evaluated(self) -> dict[int, float]:
        """The validation loss by step; 0 is before the first."""
        return dict(self._kept[0])

    @property
    def best_step(self) -> int | None:
        """The first step of the lowest validation loss; None for none."""
        finite = {step: loss for step, loss in self.evaluated.items() if math.isfinite(loss)}
        return min(finite, key=finite.__getitem__, default=None)

    def best_weights(self) -> AbstractContextManager[None]:
        """The model has the best weights within; the last, where none is."""
        return swapped(self.model, self._kept[1])

    def last_weights(self) -> AbstractContextManager[None]:
        """The model has the weights of the last step within."""
        return swapped(self.model, self._last)

    def save(self) -> bool:
        """Keep a snapshot; False where there is none to resume from.

        Of a sharded model call it in each process; of another the first writes.

        Raises:
            OSError: it cannot be written; those of before are as they were.
            RuntimeError: a step was not finite.
        """
        self.wait()
        whole = self.taken and self.stepper.whole and not self._last
        writes = self._sharded or not distributed.rank()
        if self.options.folder is None or not whole or not writes:
            return False

        (evaluated, best), state = self._kept, self.state()
        if self._sharded:  # processes of a GPU's group meet there
            best = {n: t.to(state.parameters[n].device) for n, t in best.items()}
        record = self._record and asdict(self._record)
        around = {"best": best, "evaluated": evaluated, "record": record, "made_of": self._made_of}
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
        evaluated, best = self._kept
        if loss < min(filter(math.isfinite, evaluated.values()), default=math.inf):
            best = trained(self.model)
        self._kept = {**evaluated, step: loss}, best

    def _save_if_due(self, step: int) -> None:
        due = self.options.is_save_due(step, time.monotonic() - self._saved_at)
        if self._sharded and self.options.save_every is not None:  # clocks differ
            due = distributed.gathered(due)[0]
        if not due:
            return
        try:
            self.save()
        except OSError as error:
            warnings.warn(
                f"The snapshot of step {step} could not be written ({error}). The run goes on.",
                RuntimeWarning,
                stacklevel=2,
            )
        self._saved_at = time.monotonic()

    def _resume(self) -> None:
        if self.options.folder is None:
            raise ValueError("To resume, name the folder: RunConfig(folder=...).")
        folder = Path(self.options.folder)
        last, fault = snapshots.read(folder, dict(self.model.named_parameters()))
        then, now = last.made_of, self._made_of
        if fault:
            fault += f": the run goes on from the snapshot before, of step {last.step}."
        if not then:
            fault = "The snapshot is of version 0.1: data and options were not compared."
        elif names := [n for n in {**then, **now} if then.get(n) != now.get(n)]:
            differs = [
                f"{n} was {then.get(n, 'not there')}, is {now.get(n, 'gone')}" for n in names
            ]
            raise ValueError(f"The run in {folder} cannot be resumed: {listed(differs)}.")
        if fault:
            warnings.warn(fault, RuntimeWarning, stacklevel=2)

        self.resume(last)
        self._kept = last.evaluated, last.best
        self._record = StepRecord(**last.record) if last.record else None
        self.saved_step, self.handled = self.taken, self.taken - (last.record is not None)


def waited(losses: Iterable[float], min_delta: float) -> int:
    """How many losses at the end are not lower by more than `min_delta`."""
    least, since = math.inf, 0
    for loss in losses:
        since += 1
        if loss < least - min_delta:  # NaN is never
            least = loss
            since = 0
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
