"""The training loop, which optimises whatever requires grad.

A run is a function of model, data, config and seed, whatever its caller does between steps.
"""

from __future__ import annotations

import math
import time
import warnings
import weakref
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.data.batches import Batch, batch
from gpt2.data.dataset import Dataset
from gpt2.model import GPT2, in_mode
from gpt2.training import distributed, snapshots
from gpt2.training.config import TrainConfig, lr_scale, planned
from gpt2.training.losses import check_readable, inner
from gpt2.training.snapshots import Snapshot
from gpt2.training.step import Groups, Stepper

UNREAD = 1000  # steps after which the host waits for the device even if nobody reads


class Readings:
    """Loss, gradient norm and time of steps in a row, until one is read."""

    def __init__(self, first: int, seconds: float) -> None:
        self.first = first  # the first step's number
        self.seconds = seconds  # of training so far
        self.figures: list[Tensor] = []  # (2,) each, that were not read
        self.rows: list[list[float]] = []  # those that were, as far as they are finite
        self.fault = ""
        self.parameters: Mapping[str, Tensor] = {}

    def read(self) -> None:
        """Wait for the device."""
        if not self.figures:
            return
        began = time.perf_counter()
        rows = torch.stack(self.figures).tolist()
        good = [*(all(map(math.isfinite, row)) for row in rows), False].index(False)
        if good < len(rows):  # that step and those after it were not applied
            loss, norm = rows[good]
            step = f"Step {self.first + good}: the loss is {loss}"
            self.fault = blamed(f"{step} and the gradient's norm {norm}", self.parameters)
        self.seconds += time.perf_counter() - began
        self.rows, self.figures, self.parameters = rows[:good], [], {}

    def of(self, step: int) -> dict[str, float]:
        """The numbers of a step; a RuntimeError if it, or one before, was not finite."""
        self.read()
        if self.first + len(self.rows) <= step:
            raise RuntimeError(self.fault)
        loss, norm = self.rows[step - self.first]
        return {"loss": loss, "grad_norm": norm, "seconds": self.seconds}


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimiser step, numbered from 1.

    Loss, norm and seconds lie on the device until one of them is read, which waits. It raises
    a RuntimeError if the step was not finite.
    """

    step: int
    epoch: int
    loss: float  # mean over the step's supervised tokens, nats
    lr: float  # the first group's
    grad_norm: float  # before clipping
    tokens: int  # supervised
    seconds: float  # of training until it was read
    validation: float | None = None  # loss after this step, from `fit`

    @classmethod
    def unread(cls, readings: Readings, **known: float) -> StepRecord:
        """A record whose other fields are read when they are asked for."""
        record = object.__new__(cls)
        vars(record).update(known, readings=readings)
        return record

    def __getattr__(self, name: str) -> Any:
        if "readings" not in vars(self):
            raise AttributeError(name)
        vars(self).update(vars(self)["readings"].of(self.step))
        del vars(self)["readings"]
        return getattr(self, name)


class Training(Iterator[StepRecord]):
    """A run: each item takes a step, and is its record. Arguments and errors as `train`.

    Attributes:
        total: steps of the whole run.
        steps_an_epoch: steps of a pass over the data.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        config: TrainConfig,
        groups: Groups | None = None,
    ) -> None:
        check_readable(model, data)
        self.model, self.data, self.config = model, data, config
        self.stepper = Stepper(model, config, groups, data.longest)
        self.plan = planned(data, config)
        self.steps_an_epoch = math.ceil(len(self.plan) / config.accumulate)
        self.total = config.steps or (config.epochs or 0) * self.steps_an_epoch
        self._readings = Readings(1, 0.0)
        self._used = False
        # A weak reference: a dropped run takes its CUDA graphs along at once.
        self._records = type(self)._run(weakref.proxy(self))

    def __next__(self) -> StepRecord:
        """Take the next step."""
        self._used = True
        return next(self._records)

    def _run(self) -> Generator[StepRecord]:
        stepper = self.stepper
        self._agree()
        for step in range(stepper.taken + 1, self.total + 1):
            began = time.perf_counter()
            micro_batches = self._batches_of(step)  # a function of seed and step
            scale = lr_scale(step, self.total, self.config)
            with in_mode(self.model, training=True):
                figures = stepper(micro_batches, step, scale)
            yield StepRecord.unread(
                self._readings_with(step, figures, began),
                step=step,
                epoch=(step - 1) // self.steps_an_epoch + 1,
                lr=stepper.peaks[0] * scale,
                tokens=sum(batch.n_tokens for batch in micro_batches),
            )
        self.wait()
        if not_finite(stepper.parameters):
            outcome = f"Step {self.total}, the last, was not finite in its outcome"
            raise RuntimeError(blamed(outcome, stepper.parameters))

    def close(self) -> None:
        """End the run where it is."""
        self._used = True
        self._records.close()
        self._readings.read()  # so that no record holds the model

    def wait(self) -> None:
        """Wait for the device; a RuntimeError names a step that was not finite."""
        self._readings.read()
        if self._readings.fault:
            raise RuntimeError(self._readings.fault)

    @property
    def taken(self) -> int:
        """How many steps the weights have taken; waits for the device."""
        readings = self._readings
        readings.read()
        if readings.fault:
            return readings.first + len(readings.rows) - 1
        return self.stepper.taken

    def state(self) -> Snapshot:
        """Where the run is; the next step changes the tensors.

        Raises:
            RuntimeError: an interrupt fell in the midst of an update.
        """
        if not self.stepper.whole:
            raise RuntimeError("The run was interrupted in the midst of an update.")
        step = self.taken
        return Snapshot(step=step, seconds=self._readings.seconds, **self.stepper.state())

    def resume(self, state: Snapshot) -> None:
        """Begin where that state was taken."""
        self.stepper.resume(state.step, state.parameters, state.moments)
        self._readings = Readings(state.step + 1, state.seconds)

    def made_of(self, validation: Dataset | None = None) -> dict[str, str]:
        """Everything that the run is a function of, in a few words by name."""
        groups = self.stepper.optimizer.param_groups
        return snapshots.made_of(self.model, self.data, self.config, groups, validation)

    def _agree(self) -> None:
        """Raise unless all processes begin alike."""
        if distributed.size() == 1:
            return
        weights = snapshots.of_tensors(self.stepper.parameters)
        every = distributed.gathered((self.stepper.taken, weights, self.made_of()))
        if other := [i for i, start in enumerate(every) if start != every[0]]:
            raise RuntimeError(
                f"Process {other[0]} begins with other weights, data or options than process 0: "
                "give lora.inject a seed."
            )

    def _batches_of(self, step: int) -> list[Batch]:
        """Those of a step, of few shapes where each costs a compile or a capture."""
        size, plan, seed = self.config.accumulate, self.plan, self.config.seed
        epoch, at = divmod(step - 1, self.steps_an_epoch)
        numbers = range(at * size, min((at + 1) * size, len(plan)))
        batches = [batch(self.data, plan, k, seed=seed, epoch=epoch) for k in numbers]

        network = inner(self.model)
        if not isinstance(network, GPT2):
            return batches
        limit = network.config.block_size
        shapes = [plan.shape(b.idx.shape[1], limit) for b in batches]
        compiled = self.config.compile or network is not self.model
        if compiled or self.stepper.is_graphed(math.prod(shapes[0])):
            return [b.padded(*shape) for b, shape in zip(batches, shapes, strict=True)]
        return batches

    def _readings_with(self, step: int, figures: Tensor, began: float) -> Readings:
        """Where the step's numbers will be."""
        if not 0 < len(self._readings.figures) < UNREAD:
            self.wait()
            self._readings = Readings(step, self._readings.seconds)
        self._readings.figures.append(figures)
        self._readings.parameters = self.stepper.parameters
        self._readings.seconds += time.perf_counter() - began
        return self._readings

    def __del__(self) -> None:
        if not getattr(self, "_used", True):  # it may have been refused
            warnings.warn(
                "gpt2.train(...) was never iterated, so nothing was trained: "
                "write `for record in gpt2.train(...)`.",
                RuntimeWarning,
                stacklevel=2,
                source=self,
            )
        if hasattr(self, "_records"):
            self.close()


def train(
    model: nn.Module, data: Dataset, config: TrainConfig, *, groups: Groups | None = None
) -> Training:
    """Train whatever requires grad in the model, yielding a record after each optimiser step.

    Nothing happens until it is iterated: `for record in gpt2.train(...)`. The model is in
    training mode within steps only. An interrupt leaves the weights of the last whole step. A
    step that is not finite is not applied, nor any after it: reading its record raises.

    Args:
        model: a GPT-2, `torch.compile` of one, or any model that `gpt2.summed_loss` takes.
        data: the examples.
        config: how.
        groups: optimiser groups such as `lora.parameter_groups` gives: dicts of `params` and,
            where they differ from the config's, `lr`, `weight_decay`, `betas`, `eps`.

    Raises:
        ValueError: nothing requires grad; data, groups or options do not fit the model.
        RuntimeError: what requires grad has no part in the loss; the model was changed between
            two steps; a loss, a gradient or a trained weight is not finite.
    """
    return Training(model, data, config, groups)


def not_finite(parameters: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold an infinity or NaN."""
    whole = {name: distributed.whole(p.detach()) for name, p in parameters.items()}
    return [name for name, tensor in whole.items() if not tensor.isfinite().all()]


def blamed(fault: str, parameters: Mapping[str, Tensor]) -> str:
    """What went wrong, and whether the weights can still be used."""
    if not (bad := not_finite(parameters)):
        good = "The step was not applied; the weights are good"
        return f"{fault}. {good}. Try a lower learning rate."
    more = f" and {len(bad) - 3} more" if bad[3:] else ""
    return (
        f"{fault}. The update before made values infinite or NaN in {', '.join(bad[:3])}{more}: "
        "load the weights anew, and try a lower learning rate."
    )
