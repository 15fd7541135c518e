"""Dropout that also returns what it kept, in the fastest way on each device.

`gpt2/fast` and `lora/fast` hold the same text, and a test keeps it so.
"""

from typing import Any, cast

import torch
from torch import Tensor

DRAWN_BITS, HASHED_BITS = 16, 32  # of a decision on a CPU, and in compiled code for a GPU
EXACT_ENOUGH = 0.01  # largest relative error of the dropped or the kept share


def drop(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Zero each element of `x` with probability `p` and scale the rest by `1 / (1 - p)`.

    On a CPU `p` is rounded to a multiple of 2⁻¹⁶, in compiled code for a GPU to one of 2⁻³². Where
    that would be another rate, torch draws.

    Args:
        x: of any shape.
        p: in [0, 1].

    Returns:
        The outcome, and booleans that say which elements were kept.
    """
    if x.numel() == 0:  # for which torch gives back the very tensor, twice
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    if x.device.type == "cpu" and _is_exact(p, DRAWN_BITS):
        keep = drawn_mask(x, p)
    elif x.is_cuda and torch.compiler.is_compiling() and _is_exact(p, HASHED_BITS):
        keep = hashed_mask(x, p)
    else:
        return cast(Any, torch).native_dropout(x, p, True)
    return torch.where(keep, x * (1 / (1 - p)), 0), keep


def drawn_mask(x: Tensor, p: float) -> Tensor:
    """Which elements of `x` to keep: four decisions from each 64-bit random number.

    A CPU draws its random numbers one by one.
    """
    numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    quarters = numbers.random_(-(2**63), None).view(torch.int16)[: x.numel()]
    return (quarters >= round(p * 2**16) - 2**15).view(x.shape)


def hashed_mask(x: Tensor, p: float) -> Tensor:
    """Which elements of `x` to keep, from a hash of their position and of two random seeds.

    A compiler fuses it into its reader: a backward pass computes it again instead of keeping it,
    in a tenth of the operations of torch's generator.
    """
    seeds = torch.randint(-(2**31), 2**31, (2,), device=x.device).to(torch.int32)
    h = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape)
    h = (h ^ seeds[0]) * 0x7FEB352D  # an odd factor mixes upwards, the shift downwards
    h = (h ^ ((h >> 15) & 0x1FFFF)) + seeds[1]
    return h * (0x846CA68B - 2**32) >= round(p * 2**32) - 2**31


def _is_exact(p: float, bits: int) -> bool:
    """Whether so many bits are exact enough, for the dropped and for the kept share."""
    return p < 1 and abs(round(p * 2**bits) / 2**bits - p) <= EXACT_ENOUGH * min(p, 1 - p)
