"""A run under way: an iterator of records, whose state can be taken, kept and gone on with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice

import torch
from torch import Tensor, nn

from gpt2.data.batches import Batch, Plan, batch
from gpt2.data.dataset import Dataset
from gpt2.model import GPT2, in_mode
from gpt2.training import distributed, fingerprints
from gpt2.training.config import TrainConfig
from gpt2.training.groups import Groups
from gpt2.training.schedule import lr_scale, planned, steps_an_epoch, total_steps
from gpt2.training.step import Stepper
from gpt2.training.wrapped import inner, is_compiled


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimiser step, numbered from 1."""

    step: int
    epoch: int
    loss: float  # mean over the step's supervised tokens, nats
    lr: float  # the first group's
    grad_norm: float  # before clipping
    tokens: int  # supervised
    seconds: float  # of training up to here, without what was done between the steps
    validation: float | None = None  # loss on the validation data after this step, from `fit`


@dataclass(frozen=True, kw_only=True)
class RunState:
    """All that a run is made of beside base, data, config and seed.

    Args:
        step: how many steps the weights have taken.
        seconds: how long that took.
        untold: step, tokens, loss and gradient norm of those steps that no record has told of.
        parameters: what is trained, by name; of a sharded model, what was read of this process's
            parts.
        moments: AdamW's, by their kind and the parameter's name.
    """

    step: int
    seconds: float
    untold: list[tuple[int, int, float, float]]
    parameters: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]


class Run:
    """A run under way.

    Attributes:
        total: steps of the whole run.
        pauses: whether a burst ends after this step, so that the caller sees its weights.
    """

    def __init__(
        self, model: nn.Module, data: Dataset, config: TrainConfig, groups: Groups | None
    ) -> None:
        self.model, self.data, self.config, self.groups = model, data, config, groups
        self.total = total_steps(data, config)
        self.pauses: Callable[[int], bool] = lambda step: False
        self._stepper: Stepper | None = None
        self._seconds = 0.0
        self._untold: list[tuple[int, int, Tensor]] = []
        self._resumed: RunState | None = None

    @property
    def taken(self) -> int:
        """How many steps the weights have taken."""
        if self._stepper is not None:
            return self._stepper.taken
        return self._resumed.step if self._resumed else 0

    @property
    def told(self) -> int:
        """How many steps were told of and dealt with."""
        return self.taken - len(self._untold)

    @property
    def is_whole(self) -> bool:
        """Whether a state can be taken: not where an interrupt fell in the midst of an update."""
        steps = [step for step, _, _ in self._untold]
        whole = self._stepper is None or self._stepper.whole
        return whole and steps == list(range(self.told + 1, self.taken + 1))

    def state(self) -> RunState:
        """Where the run is; tensors are the run's own, which its next step changes.

        Raises:
            RuntimeError: an interrupt fell in the midst of an update.
        """
        if not self.is_whole:
            raise RuntimeError("The run was interrupted in the midst of an update.")
        stepper = self._stepper or Stepper(self.model, self.config, self.groups)
        return RunState(
            step=self.taken,
            seconds=self._seconds,
            untold=[(n, tokens, *_two(figures)) for n, tokens, figures in self._untold],
            parameters={name: p.detach() for name, p in stepper.parameters.items()},
            moments=stepper.moments(),
        )

    def go_on_from(self, state: RunState) -> None:
        """Begin where that state was taken: the next record is of the first step it tells not of.

        Raises:
            RuntimeError: the run has begun.
        """
        if self._stepper is not None:
            raise RuntimeError("The run has begun: only a new one can go on from a state.")
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if p.requires_grad:
                    distributed.own_part(p).copy_(state.parameters[name])
        self._resumed, self._seconds = state, state.seconds
        self._untold = [(n, tokens, torch.tensor(two)) for n, tokens, *two in state.untold]

    def tell(self, record: StepRecord) -> None:
        """The caller has dealt with this record; to ask for the next one says so too."""
        if self._untold and self._untold[0][0] == record.step:
            del self._untold[0]

    def records(self) -> Generator[StepRecord]:
        """Take the steps, and tell of each."""
        self._agree()
        longest = self.data.longest
        stepper = self._stepper = Stepper(self.model, self.config, self.groups, longest)
        if self._resumed:
            stepper.resume(self._resumed.step, self._resumed.moments)
            yield from self._told(stepper)
        steps = _steps(self.data, self.config, stepper)
        while stepper.taken < self.total:
            self._burst(stepper, steps)
            yield from self._told(stepper)
        if bad := not_finite(stepper):
            raise RuntimeError(
                _blame(f"Step {self.total}, the last, was not finite in its outcome", bad)
            )

    def _agree(self) -> None:
        """Find out whether all processes begin alike."""
        if distributed.size() == 1:
            return
        mine = fingerprints.of_start(self.model, self.data, self.config, self.taken)
        all_of_them = distributed.gathered(mine)
        if other := [i for i, found in enumerate(all_of_them) if found != all_of_them[0]]:
            raise RuntimeError(
                f"Process {other[0]} begins with other weights, data or options than process 0: "
                "give all the same, and lora.inject a seed."
            )

    def _burst(self, stepper: Stepper, steps: Iterator[list[Batch]]) -> None:
        """Take steps until it is time to look at the device."""
        began = time.perf_counter()
        with in_mode(self.model, training=True):
            for micro_batches in islice(steps, self.config.sync_every):
                step, tokens = stepper.taken + 1, sum(batch.n_tokens for batch in micro_batches)
                scale = lr_scale(step, self.total, self.config)
                self._untold.append((step, tokens, stepper(micro_batches, step, scale)))
                if step == self.total or self.pauses(step):
                    break
            self._untold[-1][2].tolist()  # here the host waits for the device
        self._seconds += time.perf_counter() - began

    def _told(self, stepper: Stepper) -> Generator[StepRecord]:
        """The records of a burst; a step is told once the caller comes back for the next."""
        per_epoch = steps_an_epoch(self.data, self.config)
        rows = (
            torch.stack([f for _, _, f in self._untold]).flatten().tolist() if self._untold else []
        )
        untold = list(self._untold)
        for (step, tokens, _), loss, norm in zip(untold, rows[::2], rows[1::2], strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                said = f"Step {step}: the loss is {loss} and the gradient's norm {norm}"
                stepper.taken = step - 1  # this step and those after it were not applied
                self._untold.clear()
                raise RuntimeError(_blame(said, not_finite(stepper)))
            record = StepRecord(
                step=step,
                epoch=(step - 1) // per_epoch + 1,
                loss=loss,
                lr=stepper.peaks[0] * lr_scale(step, self.total, self.config),
                grad_norm=norm,
                tokens=tokens,
                seconds=self._seconds,
            )
            yield record
            self.tell(record)


def _two(figures: Tensor) -> tuple[float, float]:
    loss, norm = figures.tolist()
    return loss, norm


def not_finite(stepper: Stepper) -> list[str]:
    """The names of trained parameters that hold an infinity or NaN."""
    return [
        name
        for name, p in stepper.parameters.items()
        if not distributed.whole(p.detach()).isfinite().all()
    ]


def _blame(said: str, bad: list[str]) -> str:
    """What went wrong, and whether the weights can still be used."""
    if not bad:
        return f"{said}. The step was not applied; the weights are good. Try a lower learning rate."
    more = f" and {len(bad) - 3} more" if bad[3:] else ""
    return (
        f"{said}. The update before made values infinite or NaN in {', '.join(bad[:3])}{more}: "
        "load the weights anew, and try a lower learning rate."
    )


def _steps(data: Dataset, config: TrainConfig, stepper: Stepper) -> Iterator[list[Batch]]:
    """The micro-batches of each step to come, of few shapes where each costs a compile."""
    network, plan = inner(stepper.model), planned(data, config)
    static = config.compile or is_compiled(stepper.model) or stepper.graphs is not None
    limit = network.config.block_size if static and isinstance(network, GPT2) else None
    for micro_batches in micro_batches_after(stepper.taken, data, config, plan):
        if limit is not None:
            shapes = [plan.shape(b.idx.shape[1], limit) for b in micro_batches]
            micro_batches = [b.padded(*s) for b, s in zip(micro_batches, shapes, strict=True)]
        yield micro_batches


def micro_batches_after(
    taken: int, data: Dataset, config: TrainConfig, plan: Plan
) -> Iterator[list[Batch]]:
    """The micro-batches of each optimiser step after so many, without end."""
    first, skipped = divmod(taken, steps_an_epoch(data, config))
    for epoch in count(first):
        numbers = range(skipped * config.accumulate if epoch == first else 0, len(plan))
        epochs = (batch(data, plan, k, seed=config.seed, epoch=epoch) for k in numbers)
        while micro_batches := list(islice(epochs, config.accumulate)):
            yield micro_batches
