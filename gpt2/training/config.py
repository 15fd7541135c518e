"""How to train: the options of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("linear", "cosine", "constant")
GRAPHED_TOKENS = 4096
"""Tokens of a batch up to which a GPU's steps are replayed as CUDA graphs by default."""


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
        warmup_ratio: share of the steps, in [0, 1], in which the learning rate rises from zero; a
            run of one step has none.
        weight_decay: AdamW's.
        betas: AdamW's, how much of the averages of gradient and square a step keeps.
        eps: AdamW's, added to the root of the average square.
        clip: largest global norm of the gradient; None leaves it as it is.
        seed: of the order of examples and of dropout.
        autocast: compute in bfloat16 beside float32 weights.
        compile: run the loss through torch.compile; a shape takes some 15 s to compile on a GPU.
        checkpointing: keep only each block's input for the backward pass and recompute the rest.
        cuda_graph: replay each shape's whole step as one CUDA graph; None does so on a GPU for
            compiled steps and for batches of at most `GRAPHED_TOKENS` tokens, but not beside
            `accumulate` or `checkpointing`, nor of a model that is wrapped.
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
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = 1.0
    seed: int = 42
    autocast: bool = False
    compile: bool = False
    checkpointing: bool = False
    cuda_graph: bool | None = None
    sync_every: int = 1

    def __post_init__(self) -> None:
        faults = self._faulty_counts()
        if (self.epochs is None) == (self.steps is None):
            faults.append("give epochs or steps, and not both")
        faults += self._faulty_rates()
        if self.schedule not in SCHEDULES:
            faults.append(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.cuda_graph and (self.accumulate > 1 or self.checkpointing):
            faults.append("cuda_graph=True takes accumulate=1 and no checkpointing")
        if faults:
            raise ValueError("TrainConfig: " + "; ".join(faults) + ".")

    def _faulty_counts(self) -> list[str]:
        counts = {"epochs": 1, "steps": 1, "batch_size": 1, "accumulate": 1, "seed": 0}
        return [
            f"{name} must be an integer of at least {least}, got {value!r}"
            for name, least in {**counts, "sync_every": 1}.items()
            if (value := getattr(self, name)) is not None or name not in ("epochs", "steps")
            if type(value) is not int or value < least
        ]

    def _faulty_rates(self) -> list[str]:
        faults: list[str] = []
        if not 0 < self.lr < math.inf:
            faults.append(f"lr must be finite and above 0, got {self.lr!r}")
        if not 0 <= self.weight_decay < math.inf:
            faults.append(f"weight_decay must be at least 0, got {self.weight_decay!r}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            faults.append(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        if not 0 < self.eps < math.inf:
            faults.append(f"eps must be finite and above 0, got {self.eps!r}")
        if self.clip is not None and not self.clip > 0:
            faults.append(f"clip must be above 0, or None, got {self.clip!r}")
        if not 0 <= self.warmup_ratio <= 1:
            faults.append(f"warmup_ratio must be in [0, 1], got {self.warmup_ratio!r}")
        return faults
