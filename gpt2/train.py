"""The training loop, which optimises whatever requires grad: one adapter or every weight.

`train` is a generator of step records around plain functions. Dropout draws from a random state of
the run's own, so that neither side disturbs the other's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.data import Batch, Dataset, batches
from gpt2.graphs import GraphedCalls, RandomState
from gpt2.loss import summed_loss
from gpt2.model import Transformer

SCHEDULES = ("linear", "cosine", "constant")
GRAPHED = 4096
"""Tokens of a batch up to which a GPU's steps are replayed as CUDA graphs by default."""
PADDED = 32
"""Compiled and graphed batches are padded to a multiple of this, so that few shapes occur."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; exactly one of `epochs` and `steps` is to be given.

    Args:
        lr: AdamW's peak learning rate.
        epochs: passes over the data.
        steps: optimiser steps.
        batch_size: examples a micro-batch.
        accumulate: micro-batches an optimiser step; the step's loss is the mean over all their
            supervised tokens.
        schedule: "linear" or "cosine" decay to zero, or "constant", after the warm-up.
        warmup_ratio: share of the steps, in [0, 1], in which the learning rate rises from zero.
        weight_decay: AdamW's.
        clip: largest global norm of the gradient; None leaves it as it is.
        seed: of the order of examples and of dropout.
        autocast: compute in bfloat16 beside float32 weights.
        compile: run the loss through torch.compile; pays from some hundred steps on.
        checkpointing: keep only each block's input for the backward pass and recompute the rest.
        cuda_graph: replay each shape's whole step as one CUDA graph; None does so on a GPU where
            a batch has at most `GRAPHED` tokens, and starting kernels costs more than running them.
        sync_every: steps between two looks at the device; records then come in bursts.

    Raises:
        ValueError: naming each field that is out of range.
    """

    lr: float = 1e-4
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 1
    accumulate: int = 1
    schedule: str = "linear"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = 1.0
    seed: int = 42
    autocast: bool = False
    compile: bool = False
    checkpointing: bool = False
    cuda_graph: bool | None = None
    sync_every: int = 1

    def __post_init__(self) -> None:
        faults = [
            f"{name} must be an integer of at least {least}, got {value!r}"
            for name, least in (
                ("epochs", 1),
                ("steps", 1),
                ("batch_size", 1),
                ("accumulate", 1),
                ("seed", 0),
                ("sync_every", 1),
            )
            if (value := getattr(self, name)) is not None or name not in ("epochs", "steps")
            if type(value) is not int or value < least
        ]
        if (self.epochs is None) == (self.steps is None):
            faults.append("give epochs or steps, and not both")
        if not 0 < self.lr < math.inf:
            faults.append(f"lr must be finite and above 0, got {self.lr!r}")
        if not 0 <= self.weight_decay < math.inf:
            faults.append(f"weight_decay must be at least 0, got {self.weight_decay!r}")
        if self.clip is not None and not self.clip > 0:
            faults.append(f"clip must be above 0, or None, got {self.clip!r}")
        if not 0 <= self.warmup_ratio <= 1:
            faults.append(f"warmup_ratio must be in [0, 1], got {self.warmup_ratio!r}")
        if self.schedule not in SCHEDULES:
            faults.append(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.cuda_graph and self.accumulate > 1:
            faults.append("cuda_graph=True takes accumulate=1")
        if faults:
            raise ValueError("TrainConfig: " + "; ".join(faults) + ".")


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

    The model is in training mode while the loop runs and every module is back in its own mode
    after it, however it ends. An interrupt leaves the weights of the last whole step.

    Args:
        model: a GPT-2, with adapters or without; see `gpt2.loss.summed_loss` for others.
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


def total_steps(n_examples: int, config: TrainConfig) -> int:
    """The optimiser steps of a run over so many examples.

    Raises:
        ValueError: there are none.
    """
    if n_examples < 1:
        raise ValueError("There is no example to train on.")
    if config.steps is not None:
        return config.steps
    return (config.epochs or 0) * _steps_an_epoch(n_examples, config)


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The learning rate of step 1, 2, …, `total`.

    Source: transformers' `get_linear_schedule_with_warmup` and its cosine sibling.
    """
    done, warmup = step - 1, math.ceil(total * config.warmup_ratio)
    if done < warmup:
        return config.lr * done / warmup
    progress = (done - warmup) / max(1, total - warmup)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (1 - progress if config.schedule == "linear" else 1)


def _train(
    model: nn.Module, data: Dataset, config: TrainConfig, total: int
) -> Generator[StepRecord]:
    stepper = Stepper(model, config)
    per_epoch, began = _steps_an_epoch(len(data), config), time.perf_counter()
    unread: list[tuple[int, float, int, Tensor]] = []
    with _training_mode(model, config.checkpointing):
        for step, micro_batches in enumerate(islice(_steps(data, config, stepper), total), 1):
            lr = learning_rate(step, total, config)
            tokens = sum(batch.n_tokens for batch in micro_batches)
            unread.append((step, lr, tokens, stepper(micro_batches, lr)))
            if step % config.sync_every and step < total:
                continue
            figures: Any = torch.stack([figures for *_, figures in unread])
            values: list[list[float]] = figures.tolist()  # here the host waits for the device
            for (step, lr, tokens, _), (loss, norm) in zip(unread, values, strict=True):
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
            unread.clear()


class Stepper:
    """One optimiser step after another on a model's trainable parameters, nothing asked of the GPU.

    Args:
        model: in training mode.
        config: how to step; order and number of the steps are the caller's.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.model, self.config = model, config
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        on_gpu = self.device.type == "cuda"
        self.lr = torch.tensor(config.lr, device=self.device)
        self.optimizer: Any = torch.optim.AdamW(
            self.parameters,
            lr=self.lr if on_gpu else config.lr,
            weight_decay=config.weight_decay,
            fused=True,  # one call for all parameters: an interrupt cannot come in between
            capturable=on_gpu,
        )
        self.optimizer.zero_grad()  # of what the caller, or a run that was cut short, left
        self.randomness = RandomState(config.seed, self.device)
        self.graphs = GraphedCalls(self._step, self._state) if on_gpu else None

    def __call__(self, batches: Sequence[Batch], lr: float) -> Tensor:
        """Take a step; returns its loss and gradient norm, `(2,)`, still on the device.

        Where either is not finite the parameters and the optimiser stay as they are.
        """
        self.lr.fill_(lr)
        if self.graphs is None:
            self.optimizer.param_groups[0]["lr"] = lr
        share = torch.tensor(1 / sum(batch.n_tokens for batch in batches)).to(self.device)
        moved = [batch.to(self.device) for batch in batches]
        inputs = [share, *(t for batch in moved for t in (batch.idx, batch.labels))]
        with self.randomness:
            if self.graphs is not None and self._graphed(batches):
                return self.graphs(*inputs)
            return self._step(*inputs)

    def _step(self, share: Tensor, *ids_and_labels: Tensor) -> Tensor:
        total = torch.zeros_like(share)
        for idx, labels in zip(ids_and_labels[::2], ids_and_labels[1::2], strict=True):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.autocast):
                loss: Any = summed_loss(self.model, idx, labels, compile=self.config.compile)
                loss = loss * share
            if not loss.requires_grad:
                raise RuntimeError(
                    "No parameter that requires grad has a part in the loss. Is what you train "
                    "switched off, such as an adapter that is disabled or merged?"
                )
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip or math.inf)
        figures = torch.stack([total, norm.to(total.dtype)])
        # The fused optimiser reads this flag on the device and does nothing where it is 1.
        self.optimizer.found_inf = (~figures.isfinite().all()).float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return figures

    def _graphed(self, batches: Sequence[Batch]) -> bool:
        if self.config.cuda_graph is None:
            return len(batches) == 1 and batches[0].idx.numel() <= GRAPHED
        return self.config.cuda_graph

    def _state(self) -> list[Tensor]:
        """All that a step changes."""
        moments = [t for state in self.optimizer.state.values() for t in state.values()]
        return [p.detach() for p in self.parameters] + moments


def _steps(data: Dataset, config: TrainConfig, stepper: Stepper) -> Iterator[list[Batch]]:
    """The micro-batches of each optimiser step, epoch after epoch without end."""
    pad_to = PADDED if config.compile or stepper.graphs is not None else 1
    for epoch in count():
        epochs = batches(data, config.batch_size, seed=config.seed, epoch=epoch, pad_to=pad_to)
        while micro_batches := list(islice(epochs, config.accumulate)):
            yield micro_batches


def _steps_an_epoch(n_examples: int, config: TrainConfig) -> int:
    return math.ceil(n_examples / (config.batch_size * config.accumulate))


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
