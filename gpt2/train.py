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
from gpt2.graphs import GraphedCalls, RandomState, bucket
from gpt2.loss import summed_loss
from gpt2.model import Transformer
from gpt2.schedule import TrainConfig, learning_rate, steps_an_epoch, total_steps

GRAPHED = 4096
"""Tokens of a batch up to which a GPU's steps are replayed as CUDA graphs by default."""


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
        self.failed = torch.zeros((), device=self.device)  # 1 after a step that is not finite
        self.randomness = RandomState(config.seed, self.device)
        self.graphs = GraphedCalls() if on_gpu else None

    def __call__(self, batches: Sequence[Batch], lr: float) -> Tensor:
        """Take a step; returns its loss and gradient norm, `(2,)`, still on the device.

        Where either is not finite the parameters and the optimiser stay as they are, for good: the
        caller may look only some steps later.
        """
        self.lr.fill_(lr)
        if self.graphs is None:
            self.optimizer.param_groups[0]["lr"] = lr
        share = torch.tensor(1 / sum(batch.n_tokens for batch in batches)).to(self.device)
        moved = [batch.to(self.device) for batch in batches]
        inputs = [share, *(t for batch in moved for t in (batch.idx, batch.labels))]
        with self.randomness:
            if self.graphs is not None and self._graphed(batches):
                return self.graphs(self._step, self._state, *inputs).clone()
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
        self.failed.copy_(torch.maximum(self.failed, (~figures.isfinite().all()).float()))
        self.optimizer.found_inf = self.failed
        self.optimizer.step()
        self.optimizer.zero_grad()
        return figures

    def _graphed(self, batches: Sequence[Batch]) -> bool:
        if self.config.cuda_graph is None:
            small = self.config.compile or batches[0].idx.numel() <= GRAPHED
            return small and len(batches) == 1 and not self.config.checkpointing
        return self.config.cuda_graph

    def _state(self) -> list[Tensor]:
        """All that a step changes."""
        moments = [t for state in self.optimizer.state.values() for t in state.values()]
        return [self.failed, *(p.detach() for p in self.parameters), *moments]


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
