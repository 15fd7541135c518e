"""How to train: the options of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from gpt2.config import is_number
from gpt2.files import listed

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
        tokens_per_batch: tokens a micro-batch at most, in place of `batch_size`: examples of about
            one length are padded together.
        packing: lay whole examples end to end in one row of `tokens_per_batch` tokens, each read as
            if it stood alone: nothing is padded, and one shape is all there is. On a GPU attention
            then has no dropout; where the model wants it, the run says so and pads instead, unless
            packing is "always".
        accumulate: micro-batches an optimiser step; the step's loss is the mean over all their
            supervised tokens.
        schedule: "linear" or "cosine" decay to zero, or "constant", after the warm-up.
        warmup_ratio: share of the steps, in [0, 1], in which the learning rate rises from zero; a
            run of one step has none.
        warmup_steps: the same as a number of steps, in place of `warmup_ratio`.
        weight_decay: AdamW's.
        betas: AdamW's, how much of the averages of gradient and square a step keeps.
        eps: AdamW's, added to the root of the average square.
        label_smoothing: share of each target, in [0, 1), that is spread evenly over all tokens; the
            records' loss has it, an evaluation's has not.
        clip: largest global norm of the gradient; None leaves it as it is.
        seed: of the order of examples and of dropout.
        autocast: compute in bfloat16 beside float32 weights.
        compile: run the loss through torch.compile; a shape takes some 15 s to compile on a GPU.
        checkpointing: keep only each block's input for the backward pass and recompute the rest.
        cuda_graph: replay each shape's whole step as one CUDA graph; None does so on a GPU for
            compiled steps and for batches of at most `GRAPHED_TOKENS` tokens, but not beside
            `accumulate` or `checkpointing`, nor of a model that is wrapped.
        in_order: where several processes share a step, add gradients in the order of the
            micro-batches, so that any number of processes gives the same bits; False for an
            all-reduce. None does so up to 256 MiB of gradients a step. A sharded model does not.
        sync_every: steps between two looks at the device; records then come in bursts.

    Raises:
        ValueError: naming each field that is out of range.
    """

    lr: float = 1e-4
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 1
    tokens_per_batch: int | None = None
    packing: bool | Literal["always"] = False
    accumulate: int = 1
    schedule: str = "linear"
    warmup_ratio: float = 0.0
    warmup_steps: int | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    label_smoothing: float = 0.0
    clip: float | None = 1.0
    seed: int = 42
    autocast: bool = False
    compile: bool = False
    checkpointing: bool = False
    cuda_graph: bool | None = None
    in_order: bool | None = None
    sync_every: int = 1

    def __post_init__(self) -> None:
        faults = self._faulty_counts()
        if (self.epochs is None) == (self.steps is None):
            faults.append("give epochs or steps, and not both")
        if self.warmup_steps is not None and self.warmup_ratio:
            faults.append("give warmup_ratio or warmup_steps, and not both")
        if self.tokens_per_batch is not None and self.batch_size != 1:
            faults.append("give batch_size or tokens_per_batch, and not both")
        if self.packing not in (False, True, "always"):
            faults.append(f"packing must be True, False or 'always', got {self.packing!r}")
        elif self.packing and self.tokens_per_batch is None:
            faults.append("packing takes tokens_per_batch, the length of a row")
        faults += self._faulty_rates()
        if not isinstance(cast(object, self.schedule), str) or self.schedule not in SCHEDULES:
            faults.append(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.cuda_graph is True and (self.accumulate > 1 or self.checkpointing):
            faults.append("cuda_graph=True takes accumulate=1 and no checkpointing")
        for name in ("autocast", "compile", "checkpointing"):
            if type(getattr(self, name)) is not bool:
                faults.append(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("cuda_graph", "in_order"):
            if getattr(self, name) not in (None, True, False):
                faults.append(f"{name} must be True, False or None, got {getattr(self, name)!r}")
        if faults:
            raise ValueError(f"TrainConfig: {listed(faults)}.")

    def _faulty_counts(self) -> list[str]:
        counts = {"epochs": 1, "steps": 1, "batch_size": 1, "accumulate": 1, "seed": 0}
        counts |= {"sync_every": 1, "warmup_steps": 0, "tokens_per_batch": 1}
        optional = ("epochs", "steps", "warmup_steps", "tokens_per_batch")
        return [
            f"{name} must be an integer of at least {least}, got {value!r}"
            for name, least in counts.items()
            if (value := getattr(self, name)) is not None or name not in optional
            if type(value) is not int or value < least
        ]

    def _faulty_rates(self) -> list[str]:
        betas = self.betas if isinstance(cast(object, self.betas), Sequence) else ()
        sound = {
            "lr must be finite and above 0": _within(self.lr, 0, math.inf) and self.lr > 0,
            "weight_decay must be at least 0": _within(self.weight_decay, 0, math.inf),
            "betas must be two numbers in [0, 1)": len(betas) == 2
            and all(_within(beta, 0, 1) for beta in betas),
            "eps must be finite and above 0": _within(self.eps, 0, math.inf) and self.eps > 0,
            "clip must be above 0, or None": self.clip is None
            or (is_number(self.clip) and self.clip > 0),
            "label_smoothing must be in [0, 1)": _within(self.label_smoothing, 0, 1),
            "warmup_ratio must be in [0, 1]": self.warmup_ratio == 1
            or _within(self.warmup_ratio, 0, 1),
        }
        values = {rule: getattr(self, rule.partition(" ")[0]) for rule in sound}
        return [f"{rule}, got {values[rule]!r}" for rule, holds in sound.items() if not holds]


def _within(value: object, low: float, below: float) -> bool:
    return is_number(value) and low <= value < below
