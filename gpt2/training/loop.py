"""The training loop, which optimises whatever requires grad: one adapter or every weight.

`train` is a generator of step records around plain functions. Dropout draws from a random state of
the run's own, so that neither side disturbs the other's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.data.batches import Batch, batches
from gpt2.data.tokens import Dataset
from gpt2.fast.compiling import bucket
from gpt2.model import Transformer
from gpt2.training.config import TrainConfig
from gpt2.training.schedule import learning_rate, steps_an_epoch, total_steps
from gpt2.training.step import Stepper


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimiser step, numbered from 1."""

    step: int
    epoch: int
    loss: float  # mean over the step's supervised tokens, nats
    lr: float
    grad_norm: float  # before clipping
    tokens: int  # supervised
    seconds: float  # since training began


def train(model: nn.Module, data: Dataset, config: TrainConfig) -> Iterator[StepRecord]:
    """Train whatever requires grad in the model, yielding a record after each optimiser step.

    The model is in training mode within steps only: at each record, and however the run ends,
    every module is in its own mode. An interrupt leaves the weights of the last whole step.

    Args:
        model: a GPT-2, with adapters or without; see `gpt2.training.loss.summed_loss` for others.
        data: the examples.
        config: how.

    Raises:
        ValueError: nothing requires grad, or the data is empty or too long for the model.
        RuntimeError: what requires grad has no part in the loss, or a loss or gradient is not
            finite; the weights are those of the step before.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("Nothing in the model requires grad: inject an adapter or unfreeze it.")
    total = total_steps(len(data), config)
    transformer = getattr(model, "transformer", None)
    if isinstance(transformer, Transformer):
        longest, limit = int(data.lengths.max()), transformer.config.block_size
        if longest > limit:
            raise ValueError(
                f"An example has {longest} tokens and the model's context takes {limit}: "
                f"encode the data with max_length={limit}."
            )
    elif config.checkpointing:
        raise ValueError("checkpointing=True needs a GPT2.")
    return _train(model, data, config, total)


def _train(
    model: nn.Module, data: Dataset, config: TrainConfig, total: int
) -> Generator[StepRecord]:
    stepper = Stepper(model, config)
    per_epoch, began = steps_an_epoch(len(data), config), time.perf_counter()
    steps = enumerate(islice(_steps(data, config, stepper), total), 1)
    for _ in range(0, total, config.sync_every):
        burst: list[tuple[int, float, int, Tensor]] = []
        with _training_mode(model, config.checkpointing):
            for step, micro_batches in islice(steps, config.sync_every):
                lr = learning_rate(step, total, config)
                tokens = sum(batch.n_tokens for batch in micro_batches)
                burst.append((step, lr, tokens, stepper(micro_batches, lr)))
            figures: Any = torch.stack([figures for *_, figures in burst])
            values: list[list[float]] = figures.tolist()  # here the host waits for the device
        for (step, lr, tokens, _), (loss, norm) in zip(burst, values, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise RuntimeError(
                    f"Step {step}: the loss is {loss} and the gradient's norm {norm}. The step "
                    "was not applied; the weights are good. Try a lower learning rate."
                )
            yield StepRecord(
                step=step,
                epoch=(step - 1) // per_epoch + 1,
                loss=loss,
                lr=lr,
                grad_norm=norm,
                tokens=tokens,
                seconds=time.perf_counter() - began,
            )


def _steps(data: Dataset, config: TrainConfig, stepper: Stepper) -> Iterator[list[Batch]]:
    """The micro-batches of each optimiser step, epoch after epoch without end."""
    transformer = getattr(stepper.model, "transformer", None)
    static = config.compile or stepper.graphs is not None
    for epoch in count():
        epochs = batches(data, config.batch_size, seed=config.seed, epoch=epoch)
        if static and isinstance(transformer, Transformer):
            rows, limit = min(config.batch_size, len(data)), transformer.config.block_size
            epochs = (b.padded(rows, bucket(b.idx.shape[1], limit)) for b in epochs)
        while micro_batches := list(islice(epochs, config.accumulate)):
            yield micro_batches


@contextmanager
def _training_mode(model: nn.Module, checkpointing: bool) -> Generator[None]:
    """Training mode within, every module's own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    transformer = getattr(model, "transformer", None)
    before = getattr(transformer, "checkpointing", False)
    try:
        model.train()
        if isinstance(transformer, Transformer):
            transformer.checkpointing = checkpointing
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        if isinstance(transformer, Transformer):
            transformer.checkpointing = before
