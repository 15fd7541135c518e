"""The training loop, which optimises whatever requires grad.

A run is a function of model, data, config and seed, whatever its caller does between steps.
"""

from __future__ import annotations

import math
import time
import warnings
import weakref
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from gpt2.data.batches import Batch, batch
from gpt2.data.dataset import Dataset
from gpt2.files import listed
from gpt2.model import GPT2, in_mode
from gpt2.training import distributed, snapshots
from gpt2.training.config import TrainConfig, lr_scale, planned
from gpt2.training.losses import check_readable, inner
from gpt2.training.snapshots import Snapshot
from gpt2.training.step import Groups, Stepper


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimiser step, numbered from 1.

    `loss` (mean over the step's supervised tokens, nats), `grad_norm` (before clipping) and
    `seconds` (since the run began) lie on the device until one of them is read, which waits. It
    raises a RuntimeError if the step, or one before, was not finite.
    """

    step: int
    epoch: int
    lr: float  # the first group's
    tokens: int  # supervised
    validation: float | None = None  # loss after this step, from `fit`
    score: float | None = None  # of texts generated after this step, from `fit`
    figures: Tensor = field(repr=False, compare=False)  # (3,): loss, norm, first failed step
    began: float = field(repr=False, compare=False)  # the clock's time

    @cached_property
    def _read(self) -> tuple[float, float, float]:
        loss, norm, failed = self.figures.tolist()
        if failed:
            raise RuntimeError(failure(int(failed)))
        return loss, norm, time.perf_counter() - self.began

    @property
    def loss(self) -> float:
        return self._read[0]

    @property
    def grad_norm(self) -> float:
        return self._read[1]

    @property
    def seconds(self) -> float:
        return self._read[2]

    def metrics(self) -> dict[str, float]:
        """All numbers by name, without what was not evaluated."""
        names = "step epoch loss lr grad_norm tokens seconds validation score".split()
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


class Training(Iterator[StepRecord]):
    """A run: each item takes a step, and is its record. Arguments and errors as `train`.

    Attributes:
        total: steps of the whole run.
        steps_an_epoch: steps of a pass over the data.
    """

    _idle = False  # made, and not iterated

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
        self.began = time.perf_counter()
        # A weak reference: a dropped run takes its CUDA graphs along at once.
        self._records = type(self)._run(weakref.proxy(self))

    def __next__(self) -> StepRecord:
        """Take the next step."""
        self._idle = False
        return next(self._records)

    def _run(self) -> Generator[StepRecord]:
        stepper = self.stepper
        self._agree()
        for step in range(stepper.taken + 1, self.total + 1):
            micro_batches = self._batches_of(step)  # a function of seed and step
            scale = lr_scale(step, self.total, self.config)
            with in_mode(self.model, training=True):
                figures = stepper(micro_batches, step, scale)
            yield StepRecord(
                step=step,
                epoch=(step - 1) // self.steps_an_epoch + 1,
                lr=stepper.peaks[0] * scale,
                tokens=sum(batch.n_tokens for batch in micro_batches),
                figures=figures,
                began=self.began,
            )
        self.wait()

    def close(self) -> None:
        """End the run where it is."""
        self._idle = False
        self._records.close()

    def wait(self) -> None:
        """Wait for the device; a RuntimeError names a step or weights that are not finite."""
        weights = {n: distributed.whole(p.detach()) for n, p in self.stepper.parameters.items()}
        if bad := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
            raise RuntimeError(
                f"Step {self.taken} made values infinite or NaN in {listed(bad)}: load the weights "
                "anew, and try a lower learning rate."
            )
        if failed := int(self.stepper.failed):
            raise RuntimeError(failure(failed))

    @property
    def taken(self) -> int:
        """How many steps the weights have taken; waits for the device."""
        failed = int(self.stepper.failed)
        return failed - 1 if failed else self.stepper.taken

    def state(self) -> Snapshot:
        """Where the run is; the next step changes the tensors.

        Raises:
            RuntimeError: an interrupt fell in the midst of an update.
        """
        if not self.stepper.whole:
            raise RuntimeError("The run was interrupted in the midst of an update.")
        seconds = time.perf_counter() - self.began
        return Snapshot(step=self.taken, seconds=seconds, **self.stepper.state())

    def resume(self, state: Snapshot) -> None:
        """Begin where that state was taken."""
        self.stepper.resume(state.step, state.parameters, state.moments)
        self.began -= state.seconds

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

    def __del__(self) -> None:
        if self._idle:
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
    run = Training(model, data, config, groups)
    run._idle = True
    return run


def failure(step: int) -> str:
    """What a record, or the end, says of the first step that was not finite."""
    return (
        f"Step {step}: the loss or the gradient is not finite. The step was not applied, and the "
        "weights stay as they were. Try a lower learning rate."
    )
