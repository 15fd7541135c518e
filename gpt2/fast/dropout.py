"""Dropout whose random decisions cost little, wherever torch's own are what a step waits for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dropout(nn.Dropout):
    """`nn.Dropout` on `dropout` below."""

    def forward(self, input: Tensor) -> Tensor:
        """Zero elements at random and scale up the rest, in training mode."""
        return dropout(input, self.p) if self.training else input


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero each element with probability `p`, and scale the rest by `1 / (1 - p)`.

    On a CPU `p` is rounded to a multiple of 2⁻¹⁶, in compiled code for a GPU to one of 2⁻³².
    """
    if p == 0:
        return x
    if x.device.type == "cpu":
        keep = drawn_mask(x, p)
    elif x.is_cuda and torch.compiler.is_compiling():
        keep = hashed_mask(x, p)
    else:
        return F.dropout(x, p)
    return torch.where(keep, x * (1 / (1 - p)), 0)


def drawn_mask(x: Tensor, p: float) -> Tensor:
    """Which elements of `x` to keep: four decisions from each 64-bit random number.

    A CPU draws its random numbers one by one.
    """
    numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    quarters = numbers.random_(-(2**63), None).view(torch.int16)[: x.numel()]
    return (quarters >= round(p * 2**16) - 2**15).view(x.shape)


def hashed_mask(x: Tensor, p: float) -> Tensor:
    """Which elements of `x` to keep, from a hash of their position and of two random seeds.

    A compiler fuses it into whatever reads it, so that backward passes compute it again instead of
    keeping it; torch's own generator takes ten times as many operations.
    """
    seeds = torch.randint(-(2**31), 2**31, (2,), device=x.device).to(torch.int32)
    h = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape)
    h = (h ^ seeds[0]) * 0x7FEB352D  # an odd constant mixes upwards, the shift downwards
    h = (h ^ ((h >> 15) & 0x1FFFF)) + seeds[1]
    return h * (0x846CA68B - 2**32) >= round(p * 2**32) - 2**31
