"""A run with what people do around its steps: validation, the best kept, a stop, snapshots.

It composes `train`, `evaluate` and snapshots, and knows of weights by their names only: what is
kept as the best is whatever is trained.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from gpt2.data.dataset import Dataset
from gpt2.files import is_sharded
from gpt2.training import distributed, fingerprints, snapshots
from gpt2.training.checks import check_readable
from gpt2.training.config import TrainConfig
from gpt2.training.evaluation import evaluate
from gpt2.training.groups import Groups
from gpt2.training.loop import StepRecord, train
from gpt2.training.run_config import RunConfig, lowest, waited
from gpt2.training.schedule import steps_an_epoch
from gpt2.training.snapshots import Snapshot
from gpt2.training.weights import parts_of, put, swapped, trained


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
    """Train as `gpt2.train` does; evaluate, keep the best, stop early, save and go on again.

    Iterate the result: `for record in gpt2.fit(...)`. Before the first step the model is evaluated
    as it is. When the run has come to its end the model has the weights of the lowest validation
    loss; of equal ones the first. Evaluations and snapshots change no bit of a step.

    Args:
        model, data, config, groups: as for `gpt2.train`.
        validation: examples that are only read; without them the last weights are the result.
        run: when to evaluate, to stop and to save.
        resume: go on, bit for bit on a CPU, from the snapshot in the run's folder.

    Raises:
        ValueError: as `gpt2.train`; the validation data cannot be read by the model; patience
            without validation data; the snapshot is of a run of other data, base or options.
        FileNotFoundError: there is no snapshot to go on from.
        RuntimeError: as `gpt2.train`.
    """
    run = run or RunConfig()
    if validation is not None:
        check_readable(model, validation)
    elif run.patience is not None or run.eval_every is not None:
        raise ValueError("patience and eval_every need validation data.")
    if resume and run.folder is None:
        raise ValueError("To resume, name the folder of the snapshots: RunConfig(folder=...).")
    return Fit(model, data, config, groups, validation, run, resume)


@dataclass(frozen=True)
class _Kept:
    """What was found so far; replaced as a whole, so that no interrupt leaves half of it."""

    evaluated: Mapping[int, float] = field(default_factory=dict[int, float])
    best: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


class Fit(Iterator[StepRecord]):
    """A run as `fit` makes it: its records, and what was found on the validation data."""

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
        self.model, self.validation, self.options = model, validation, run
        self.training = train(model, data, config, groups=groups)
        config = self.config = self.training.run.config  # which may pack no more
        every = run.eval_every or steps_an_epoch(data, config)
        total = self.training.run.total

        def is_due(step: int) -> bool:
            return validation is not None and (step % every == 0 or step == total)

        def pauses(step: int) -> bool:
            return is_due(step) or run.is_save_step(step)

        self._is_due, self.training.run.pauses = is_due, pauses
        self.made_of: Mapping[str, str] = {}
        self._kept, self._last = _Kept(), dict[str, Tensor]()
        self._sharded = any(map(is_sharded, model.parameters()))
        self._saved_at, self.saved_step = time.monotonic(), 0
        try:
            if run.folder is not None:
                self.made_of = fingerprints.of_run(model, data, config, validation)
                if resume:
                    self._resume(Path(run.folder))
        except BaseException:
            self.training.close()
            raise
        self._told: StepRecord | None = None

    def __next__(self) -> StepRecord:
        """Take the next step."""
        if self._told is not None:
            self.training.run.tell(self._told)
            self._save_if_due(self._told.step)
            self._told = None
        self._evaluate(0)
        record = None if self._is_out_of_patience() else next(self.training, None)
        if record is None:
            self._ended()
            raise StopIteration
        if self.taken == record.step:
            self._evaluate(record.step)
        self._told = replace(record, validation=self._kept.evaluated.get(record.step))
        return self._told

    def close(self) -> None:
        """End the run where it is."""
        self.training.close()

    @property
    def taken(self) -> int:
        """How many steps the weights have taken."""
        return self.training.run.taken

    @property
    def told(self) -> int:
        """How many steps the records told of, in this process and before."""
        return self.training.run.told

    @property
    def total(self) -> int:
        """Steps of the whole run, if nothing stops it early."""
        return self.training.run.total

    @property
    def evaluated(self) -> dict[int, float]:
        """The validation loss after each step that was evaluated; 0 is before the first."""
        return dict(self._kept.evaluated)

    @property
    def best_step(self) -> int | None:
        """The step of the lowest validation loss, whose weights are kept; None for none yet."""
        return lowest(self.evaluated)

    @contextmanager
    def best_weights(self) -> Generator[None]:
        """The model has the best weights within, and its own after; the last, where none is."""
        with swapped(self.model, self._kept.best):
            yield

    @contextmanager
    def last_weights(self) -> Generator[None]:
        """The model has the weights of the last step within, and its own after."""
        with swapped(self.model, self._last):
            yield

    def save(self) -> bool:
        """Keep a snapshot; False where there is nothing that could be gone on from.

        That is so before the first step, where an interrupt fell in the midst of an update, and in
        all processes but the first, which writes for all; of a sharded model call it in each.

        Raises:
            OSError: it cannot be written; those of before are as they were.
        """
        run = self.training.run
        can = self.options.folder is not None and self.taken and run.is_whole and not self._last
        if not can or (distributed.rank() and not self._sharded):
            return False
        kept, state = self._kept, run.state()
        best = {
            name: distributed.as_part(t, state.parameters[name]) for name, t in kept.best.items()
        }
        found = Snapshot(made_of=self.made_of, state=state, evaluated=kept.evaluated, best=best)
        snapshots.write(Path(self.options.folder or ""), found)
        self.saved_step = state.step
        return True

    def _ended(self) -> None:
        """Let go of the run; the model gets the best weights."""
        self.training.close()
        if self._kept.best and self.best_step != self.taken and not self._last:
            self._last = trained(self.model)
            put(self.model, self._kept.best)

    def _evaluate(self, step: int) -> None:
        if self.validation is None or step in self._kept.evaluated or not self._is_due(step):
            return
        size, autocast = self.config.batch_size, self.config.autocast
        if budget := self.config.tokens_per_batch:
            size = max(1, budget // self.validation.longest)
        loss = evaluate(self.model, self.validation, batch_size=size, autocast=autocast).loss
        evaluated = {**self._kept.evaluated, step: loss}
        best = trained(self.model) if lowest(evaluated) == step else self._kept.best
        self._kept = _Kept(evaluated, best)

    def _is_out_of_patience(self) -> bool:
        patience = self.options.patience
        losses = self._kept.evaluated.values()
        return patience is not None and waited(losses, self.options.min_delta) >= patience

    def _save_if_due(self, step: int) -> None:
        since = time.monotonic() - self._saved_at
        due = self.taken == step and self.options.is_save_due(step, since)
        if not (distributed.first_says(due) if self._sharded else due):
            return
        try:
            self.save()
        except OSError as error:
            warnings.warn(
                f"The snapshot of step {step} could not be written ({error}). The run goes on, and "
                "the snapshot before stays.",
                RuntimeWarning,
                stacklevel=2,
            )
        self._saved_at = time.monotonic()

    def _resume(self, folder: Path) -> None:
        found, fault = snapshots.read(folder, parts_of(self.model))
        if differs := fingerprints.differences(found.made_of, self.made_of):
            raise ValueError(
                f"The run in {folder} cannot be gone on with: {differs}. Give what it was begun "
                "with, or begin anew in another folder."
            )
        if fault:
            warnings.warn(
                f"{fault}: the run goes on from the snapshot before, of step {found.state.step}.",
                RuntimeWarning,
                stacklevel=2,
            )
        self._kept, self.saved_step = _Kept(found.evaluated, found.best), found.state.step
        self.training.run.go_on_from(found.state)
