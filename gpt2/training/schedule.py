"""How many steps a run makes, and each step's share of the learning rate."""

import math

from gpt2.data.batches import Plan, plan
from gpt2.data.dataset import Dataset
from gpt2.training.config import TrainConfig


def total_steps(data: Dataset | int, config: TrainConfig) -> int:
    """The optimiser steps of a run over the data, or over so many examples.

    Raises:
        ValueError: there are none; or with `tokens_per_batch`, which needs the data, a number.
    """
    if (data if isinstance(data, int) else len(data)) < 1:
        raise ValueError("There is no example to train on.")
    if config.steps is not None and isinstance(data, int):
        return config.steps
    steps = steps_an_epoch(data, config)  # raises what would stop the first step
    return config.steps or (config.epochs or 0) * steps


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The learning rate of step 1, 2, …, `total`; a ValueError for any other."""
    if not 1 <= step <= total:
        raise ValueError(f"step must be in 1..{total}, got {step}.")
    return config.lr * lr_scale(step, total, config)


def lr_scale(step: int, total: int, config: TrainConfig) -> float:
    """The learning rate of step 1, 2, …, `total` as a share, in [0, 1], of the peak.

    It is zero in the first step of a warm-up, as in transformers; a run of one step has none.

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


def steps_an_epoch(data: Dataset | int, config: TrainConfig) -> int:
    """The optimiser steps of one pass over the data; the last may be a smaller one."""
    if not isinstance(data, int):
        batches = len(planned(data, config))
    elif config.tokens_per_batch is None:
        batches = math.ceil(data / config.batch_size)
    else:
        raise ValueError("To count steps of tokens_per_batch give the Dataset, not its length.")
    return math.ceil(batches / config.accumulate)


def planned(data: Dataset, config: TrainConfig) -> Plan:
    """How an epoch of the data falls into micro-batches."""
    size = config.batch_size if config.tokens_per_batch is None else None
    return plan(data, size, config.tokens_per_batch, config.packing)
