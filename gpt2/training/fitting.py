"""A run with validation, early stopping and snapshots."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gpt2.data.dataset import Dataset
from gpt2.files import is_sharded
from gpt2.training import distributed, fingerprints, snapshots
from gpt2.training.config import RunConfig, TrainConfig
from gpt2.training.evaluation import evaluate
from gpt2.training.loop import StepRecord, Training
from gpt2.training.losses import check_readable
from gpt2.training.snapshots import Snapshot
from gpt2.training.step import Groups

Weights = Mapping[str, Tensor]


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
    step too. At the end it has the weights of the lowest validation loss, of equal ones the first.

    Args:
        model, data, config, groups: as for `gpt2.train`.
        validation: examples that are only read; without them the last weights are the result.
        run: when to evaluate, to stop and to save.
        resume: go on, bit for bit on a CPU, from the snapshot in the run's folder.

    Raises:
        ValueError, RuntimeError: as `gpt2.train`; also for validation data that does not fit, and
            a snapshot of a run of other data, base or options.
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
            self._made_of = fingerprints.of_run(model, data, config, self.groups, validation)
        if resume:
            self._resume()
        self._used = False

    def _run(self) -> Generator[StepRecord]:
        self._evaluate_if_due(self.taken)
        if self._record is not None:  # of a run that was resumed
            yield self._validated(self._record)
            self._mark_handled()
        steps = super()._run()
        patience = self.options.patience or math.inf
        while waited(self.evaluated.values(), self.options.min_delta) < patience:
            self._record = next(steps, None)
            if self._record is None:
                break
            self._evaluate_if_due(self._record.step)
            yield self._validated(self._record)
            self._mark_handled()
            self._save_if_due(self.handled)
        steps.close()
        if self._kept[1] and self.best_step != self.taken:
            self._last = trained(self.model)
            put(self.model, self._kept[1])

    def _validated(self, record: StepRecord) -> StepRecord:
        validation = self.evaluated.get(record.step)
        return record if validation is None else replace(record, validation=validation)

    def _mark_handled(self) -> None:
        """The caller came back."""
        if self._record is not None:
            self.handled, self._record = self._record.step, None

    @property
    def evaluated(self) -> dict[int, float]:
        """The validation loss by step; 0 is before the first."""
        return dict(self._kept[0])

    @property
    def best_step(self) -> int | None:
        """The step of the lowest validation loss, whose weights are kept; None for none yet."""
        return lowest(self.evaluated)

    @contextmanager
    def best_weights(self) -> Generator[None]:
        """The model has the best weights within; the last, where none is."""
        with swapped(self.model, self._kept[1]):
            yield

    @contextmanager
    def last_weights(self) -> Generator[None]:
        """The model has the weights of the last step within."""
        with swapped(self.model, self._last):
            yield

    def save(self) -> bool:
        """Keep a snapshot; False where there is none to resume from.

        That is so before the first step, in the midst of an update, and in all processes but the
        first; of a sharded model call it in each.

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
        snapshot = Snapshot(self._made_of, state, self._record, evaluated, best)
        snapshots.write(Path(self.options.folder), snapshot)
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
        evaluated = {**self.evaluated, step: loss}
        best = trained(self.model) if lowest(evaluated) == step else self._kept[1]
        self._kept = evaluated, best

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
                f"The snapshot of step {step} could not be written ({error}). The run goes on; "
                "the snapshot before stays.",
                RuntimeWarning,
                stacklevel=2,
            )
        self._saved_at = time.monotonic()

    def _resume(self) -> None:
        if self.options.folder is None:
            raise ValueError("To resume, name the folder: RunConfig(folder=...).")
        folder = Path(self.options.folder)
        last, fault = snapshots.read(folder, dict(self.model.named_parameters()))
        differs = fingerprints.differences(last.made_of, self._made_of)
        if not last.made_of:
            old = "The snapshot is of version 0.1: data and options were not compared."
            warnings.warn(old, RuntimeWarning, stacklevel=2)
        elif differs:
            raise ValueError(
                f"The run in {folder} cannot be resumed: {differs}. Give what it began with, or "
                "another folder."
            )
        if fault:
            warnings.warn(
                f"{fault}: the run goes on from the snapshot before, of step {last.state.step}.",
                RuntimeWarning,
                stacklevel=2,
            )

        self.resume(last.state)
        self._kept, self._record = (last.evaluated, last.best), last.record
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


def lowest(evaluated: Mapping[int, float]) -> int | None:
    """The first step of the lowest loss, or None."""
    finite = {step: loss for step, loss in evaluated.items() if math.isfinite(loss)}
    return min(finite, key=finite.__getitem__, default=None)


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
