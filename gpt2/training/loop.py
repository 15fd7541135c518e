"""The training loop, which optimises whatever requires grad: one adapter or every weight.

A run is a pure function of model, data, config and seed, whatever its caller does between steps.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice

import torch
from torch import Tensor, nn

from gpt2.data.batches import Batch, batch
from gpt2.data.tokens import Dataset
from gpt2.fast.untyped import floats
from gpt2.model import GPT2
from gpt2.training.config import TrainConfig
from gpt2.training.groups import Groups, listed
from gpt2.training.packing import settled
from gpt2.training.schedule import lr_scale, planned, steps_an_epoch, total_steps
from gpt2.training.step import Stepper, check
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
    seconds: float  # since training began


class Training(Iterator[StepRecord]):
    """A run: each item takes a step, or a burst of `sync_every` steps, and tells of one.

    It says so if it was thrown away without a step, as Python does of a coroutine that nobody
    awaited.
    """

    def __init__(self, records: Generator[StepRecord]) -> None:
        self._records, self._used = records, False

    def __next__(self) -> StepRecord:
        """Take the next step."""
        self._used = True
        return next(self._records)

    def close(self) -> None:
        """End the run where it is."""
        self._used = True
        self._records.close()

    def __del__(self) -> None:
        if not self._used:
            warnings.warn(
                "gpt2.train(...) was never iterated, so nothing was trained: "
                "write `for record in gpt2.train(...)`, or `list(gpt2.train(...))`.",
                RuntimeWarning,
                stacklevel=2,
                source=self,
            )


def train(
    model: nn.Module, data: Dataset, config: TrainConfig, *, groups: Groups | None = None
) -> Training:
    """Train whatever requires grad in the model, yielding a record after each optimiser step.

    Nothing happens until the result is iterated: `for record in gpt2.train(...)`. The model is in
    training mode within steps only: at each record, and however the run ends, every module is in
    its own mode. An interrupt leaves the weights of the last whole step; given several groups it
    may come between two of them.

    Args:
        model: a GPT-2, with adapters or without, or a wrapper around one, such as
            `torch.compile(model)` or `DistributedDataParallel(model)`; see
            `gpt2.training.wrapped.summed_loss` for others. Only what is given is called.
        data: the examples.
        config: how.
        groups: optimiser groups such as `lora.parameter_groups` gives: dicts of `params` and, where
            they differ from the config's, `lr`, `weight_decay`, `betas`, `eps`. The schedule scales
            each group's `lr`.

    Raises:
        ValueError: nothing requires grad; the data is no `Dataset`, empty or too long for the
            model; groups that do not hold each trained parameter once; options that the model
            cannot follow.
        RuntimeError: what requires grad has no part in the loss; the model was changed between two
            steps; a loss, a gradient or a trained weight is not finite.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}.")
    if not isinstance(data, Dataset):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            f"data must be a gpt2.Dataset, got {type(data).__name__}: make one of texts with "
            "gpt2.encode(texts, tokenizer), and of a file with "
            "gpt2.encode(gpt2.read_jsonl(file), tokenizer)."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("Nothing in the model requires grad: inject an adapter or unfreeze it.")
    network = inner(model)
    if isinstance(network, GPT2):
        longest, limit = data.longest, network.config.block_size
        if longest > limit:
            raise ValueError(
                f"An example has {longest} tokens and the model's context takes {limit}: "
                f"encode the data with max_length={limit}."
            )
    config = settled(network, config)
    total = total_steps(data, config)
    groups = None if groups is None else listed(groups)
    check(model, config, groups)
    return Training(_train(model, data, config, groups, total))


def _train(
    model: nn.Module, data: Dataset, config: TrainConfig, groups: Groups | None, total: int
) -> Generator[StepRecord]:
    stepper = Stepper(model, config, groups)
    per_epoch, began = steps_an_epoch(data, config), time.perf_counter()
    steps = enumerate(islice(_steps(data, config, stepper), total), 1)
    for _ in range(0, total, config.sync_every):
        burst: list[tuple[int, int]] = []
        taken: list[Tensor] = []
        with _training_mode(model):
            for step, micro_batches in islice(steps, config.sync_every):
                burst.append((step, sum(batch.n_tokens for batch in micro_batches)))
                taken.append(stepper(micro_batches, step, lr_scale(step, total, config)))
            figures = floats(torch.stack(taken).flatten())  # here the host waits for the device
        for (step, tokens), loss, norm in zip(burst, figures[::2], figures[1::2], strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                said = f"Step {step}: the loss is {loss} and the gradient's norm {norm}"
                raise RuntimeError(_blame(said, stepper))
            yield StepRecord(
                step=step,
                epoch=(step - 1) // per_epoch + 1,
                loss=loss,
                lr=stepper.peaks[0] * lr_scale(step, total, config),
                grad_norm=norm,
                tokens=tokens,
                seconds=time.perf_counter() - began,
            )
    if _not_finite(stepper):
        raise RuntimeError(
            _blame(f"Step {total}, the last, was not finite in its outcome", stepper)
        )


def _blame(said: str, stepper: Stepper) -> str:
    """What went wrong, and whether the weights can still be used."""
    if not (bad := _not_finite(stepper)):
        return f"{said}. The step was not applied; the weights are good. Try a lower learning rate."
    more = f" and {len(bad) - 3} more" if bad[3:] else ""
    return (
        f"{said}. The update before made values infinite or NaN in {', '.join(bad[:3])}{more}: "
        "load the weights anew, and try a lower learning rate."
    )


def _not_finite(stepper: Stepper) -> list[str]:
    return [name for name, p in stepper.parameters.items() if not p.isfinite().all()]


def _steps(data: Dataset, config: TrainConfig, stepper: Stepper) -> Iterator[list[Batch]]:
    """The micro-batches of each optimiser step, epoch after epoch without end."""
    network, plan = inner(stepper.model), planned(data, config)
    static = config.compile or is_compiled(stepper.model) or stepper.graphs is not None
    limit = network.config.block_size if static and isinstance(network, GPT2) else None
    for epoch in count():
        numbers = range(len(plan))
        epochs = (batch(data, plan, k, seed=config.seed, epoch=epoch) for k in numbers)
        if limit is not None:
            epochs = (b.padded(*plan.shape(b.idx.shape[1], limit)) for b in epochs)
        while micro_batches := list(islice(epochs, config.accumulate)):
            yield micro_batches


@contextmanager
def _training_mode(model: nn.Module) -> Generator[None]:
    """Training mode within, every module's own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
