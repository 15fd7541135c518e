"""The options of a run, its steps, and their learning rates."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2.data.batches import Plan, plan
from gpt2.data.dataset import Dataset
from gpt2.files import is_number, listed, outside

SCHEDULES = ("linear", "cosine", "constant")
OPTIONS = ("lr", "weight_decay", "betas", "eps")  # of an optimiser group
GRAPHED_TOKENS = 4096
"""Tokens of a batch up to which a GPU replays its steps as CUDA graphs."""


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
        packing: lay whole examples end to end in one row of `tokens_per_batch` tokens. A GPU then
            takes no model with dropout in attention.
        accumulate: micro-batches a step; the loss is the mean over all their supervised tokens.
        schedule: "linear" or "cosine" decay to zero, or "constant", after the warm-up.
        warmup_ratio: share of the steps, in [0, 1], in which the learning rate rises from zero.
        warmup_steps: the same as a number of steps.
        weight_decay: AdamW's, decoupled from the gradient.
        betas: AdamW's decay rates of its two moments, in [0, 1).
        eps: AdamW's, added to the root of the second moment.
        label_smoothing: share of each target, in [0, 1), that is spread evenly over all tokens.
            An evaluation's loss has none.
        clip: largest global norm of the gradient; None leaves it as it is.
        seed: of the order of examples and of dropout.
        autocast: compute in bfloat16 beside float32 weights.
        compile: run the loss through torch.compile; a shape takes about 15 s on a GPU.
        checkpointing: keep only each block's input for the backward pass and recompute the rest.
        cuda_graph: replay each shape's step as one CUDA graph; None does so on one GPU where it is
            compiled or has few tokens, but not beside `accumulate` or `checkpointing`.

    Raises:
        ValueError: naming each field that is out of range.
    """

    lr: float = 1e-4
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 1
    tokens_per_batch: int | None = None
    packing: bool = False
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

    def __post_init__(self) -> None:
        counts = ("epochs", "steps", "batch_size", "tokens_per_batch", "accumulate")
        least = dict.fromkeys(counts, 1) | {"seed": 0, "warmup_steps": 0}
        intervals = {
            "lr": "(0, inf)",
            "eps": "(0, inf)",
            "weight_decay": "[0, inf)",
            "label_smoothing": "[0, 1)",
            "warmup_ratio": "[0, 1]",
        }
        if self.clip is not None:
            intervals["clip"] = "(0, inf]"

        faults = outside(self, least, **intervals)
        given: Any = self.betas
        betas = given if isinstance(given, tuple | list) else ()
        if len(betas) != 2 or not all(is_number(b) and 0 <= b < 1 for b in betas):
            faults.append(f"betas must be two numbers in [0, 1), got {given!r}")
        if self.schedule not in SCHEDULES:
            faults.append(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")

        if (self.epochs is None) == (self.steps is None):
            faults.append("give epochs or steps, and not both")
        if self.warmup_steps is not None and self.warmup_ratio:
            faults.append("give warmup_ratio or warmup_steps, and not both")
        if self.tokens_per_batch is not None and self.batch_size != 1:
            faults.append("give batch_size or tokens_per_batch, and not both")
        if self.packing and self.tokens_per_batch is None:
            faults.append("packing takes tokens_per_batch, the length of a row")
        if self.cuda_graph and (self.accumulate != 1 or self.checkpointing):
            faults.append("cuda_graph=True takes accumulate=1 and no checkpointing")
        if faults:
            raise ValueError(f"TrainConfig: {listed(faults)}.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What is done around the steps; nothing here changes a step.

    Args:
        eval_every: steps between two evaluations; None for once an epoch. The last step is
            evaluated too.
        patience: evaluations without a lower loss after which the run stops; None for never.
        save_every: steps between two snapshots; None for none.
        folder: where snapshots are kept; made if it is missing.

    Raises:
        ValueError: naming each field that is out of range.
    """

    eval_every: int | None = None
    patience: int | None = None
    save_every: int | None = None
    folder: str | Path | None = None

    def __post_init__(self) -> None:
        faults = outside(self, {"eval_every": 1, "patience": 1, "save_every": 1})
        if self.save_every is not None and self.folder is None:
            faults.append("save_every needs a folder")
        if faults:
            raise ValueError(f"RunConfig: {listed(faults)}.")


# Steps and learning rates


def total_steps(data: Dataset, config: TrainConfig) -> int:
    """The optimiser steps of a run over the data; a ValueError where it cannot be batched so."""
    steps = math.ceil(len(planned(data, config)) / config.accumulate)
    return config.steps or (config.epochs or 0) * steps


def lr_scale(step: int, total: int, config: TrainConfig) -> float:
    """The learning rate of step 1, 2, …, `total` as a share, in [0, 1], of the peak.

    It is zero in the first step of a warm-up; a run of one step has none.

    Source: transformers' `get_linear_schedule_with_warmup` and its cosine sibling.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = math.ceil(total * config.warmup_ratio)
    done, warmup = step - 1, warmup if total > 1 else 0
    if done < warmup:
        return done / warmup
    progress = (done - warmup) / max(1, total - warmup)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if config.schedule == "linear" else 1.0


def planned(data: Dataset, config: TrainConfig) -> Plan:
    """How an epoch of the data falls into micro-batches."""
    size = config.batch_size if config.tokens_per_batch is None else None
    return plan(data, size, config.tokens_per_batch, config.packing)
