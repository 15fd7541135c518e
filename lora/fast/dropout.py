"""Dropout that also says what it kept, in the way that costs least on each device."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def drop(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Zero each element of `x` with probability `p` and scale the rest by `1 / (1 - p)`.

    On a CPU `p` is rounded to a multiple of 2⁻¹⁶, in compiled code for a GPU to one of 2⁻³².

    Returns:
        The outcome, and booleans that say which elements were kept.
    """
    if x.device.type == "cpu":
        keep = _drawn_mask(x, p)
    elif x.is_cuda and torch.compiler.is_compiling():
        keep = _hashed_mask(x, p)
    else:
        return cast(Any, torch).native_dropout(x, p, True)
    return torch.where(keep, x * (1 / (1 - p)), 0), keep


def _drawn_mask(x: Tensor, p: float) -> Tensor:
    """Four decisions from each 64-bit random number, since a CPU draws them one by one."""
    numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    quarters = numbers.random_(-(2**63), None).view(torch.int16)[: x.numel()]
    return (quarters >= round(p * 2**16) - 2**15).view(x.shape)


def _hashed_mask(x: Tensor, p: float) -> Tensor:
    """Decisions from a hash of position and seeds, which a compiler fuses into what reads them.

    So a backward pass computes them again instead of keeping them, and they take a tenth of the
    operations of torch's own generator.
    """
    seeds = torch.randint(-(2**31), 2**31, (2,), device=x.device).to(torch.int32)
    h = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape)
    h = (h ^ seeds[0]) * 0x7FEB352D  # an odd factor mixes upwards, the shift downwards
    h = (h ^ ((h >> 15) & 0x1FFFF)) + seeds[1]
    return h * (0x846CA68B - 2**32) >= round(p * 2**32) - 2**31
