"""How many slots of a population fit in memory, before one is made."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

import gpt2

STACKS = 10  # copies of a slot's parameters: with gradients, moments, and an update's own tensors
KEPT = 45  # numbers a token, channel and block that are kept for the backward pass; measured
SPARE = 0.9  # share of what is free that may be taken


def check(
    model: gpt2.GPT2, slots: int, parameters: int, tokens: int, config: gpt2.TrainConfig
) -> None:
    """Find out whether so many slots fit.

    Args:
        model: the base, on its device.
        slots: how many.
        parameters: of a slot.
        tokens: of a slot in a micro-batch.
        config: how all are trained.

    Raises:
        ValueError: they do not; saying how many do.
    """
    device = next(model.parameters()).device
    free, each = available(device), of_slot(model, parameters, tokens, config)
    if free is None or slots * each <= free * SPARE:
        return
    fit, gib = int(free * SPARE // each), 2**30
    do = f"give --slots {fit}" if fit else "give a smaller train_batch_size or a smaller r"
    raise ValueError(
        f"{slots:,} slots take about {slots * each / gib:,.2f} GiB, and {free / gib:,.2f} are free "
        f"on {device}: about {fit:,} fit. So {do}."
    )


def of_slot(model: gpt2.GPT2, parameters: int, tokens: int, config: gpt2.TrainConfig) -> float:
    """About how many bytes a slot takes in a step."""
    size, c = next(model.parameters()).element_size(), model.config
    own = max(size, 4) * STACKS * parameters
    size = 2 if config.autocast else size
    return own + size * KEPT * tokens * c.n_layer * c.n_embd


def available(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_free(), default=None) if device.type == "cpu" else None


def _free() -> list[int]:
    """What the machine has free, and what this group of processes may still take; on Linux."""
    found: list[int] = []
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        found.append(limit - int((group / "memory.current").read_text()))
    return found
