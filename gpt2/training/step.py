"""One optimiser step: micro-batches, gradients, clip, AdamW; on a GPU as one CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.data.batches import Batch
from gpt2.fast.graphs import GraphedCalls
from gpt2.training.config import TrainConfig
from gpt2.training.loss import summed_loss
from gpt2.training.randomness import RandomState

GRAPHED = 4096
"""Tokens of a batch up to which a GPU's steps are replayed as CUDA graphs by default."""


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
