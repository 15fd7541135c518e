"""Dropout for a population: each slot's mask is its own, whatever its neighbours do.

On a CPU a slot draws what it would draw alone: from its own stream of random numbers, for its own
rows and lengths, padding left out. Elsewhere masks are hashes of the slot's seed, its step, the
place of the dropout in the model and the element's place in the slot, made by a fixed number of
kernels.

Shapes: k slots · b rows of a slot · T time · S places in the model that drop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpt2.fast.devices import Generator
from gpt2.fast.dropout import drop

GOLDEN = 0x9E3779B9


class Streams:
    """What drops on a CPU: slot i draws from a stream of its own, for `sizes[i]` `(rows, T)`."""

    def __init__(self, k: int) -> None:
        self.sizes = [(0, 0)] * k
        self._states: list[Tensor | None] = [None] * k
        self._generator = Generator(torch.device("cpu"))

    def begin(self, seeds: Sequence[int | None], sizes: Sequence[tuple[int, int]]) -> None:
        """Set each stream to where its slot's micro-batch begins; None for an idle slot."""
        self.sizes = list(sizes)
        for i, seed in enumerate(seeds):
            if seed is not None:
                self._generator.seed(seed)
                self._states[i] = self._generator.get()

    def __call__(self, x: Tensor, p: float | Tensor) -> Tensor:
        """Drop elements of `(k·b, T, …)`, or of `(k·b, H, T, T)`, each slot's at its own rate."""
        k, b = len(self.sizes), len(x) // len(self.sizes)
        rates = p.tolist() if isinstance(p, Tensor) else [p] * k
        factors = torch.ones_like(x)
        for i, (rate, (rows, T)) in enumerate(zip(rates, self.sizes, strict=True)):
            if rate and rows:
                whole = (slice(T),) if x.dim() == 3 else (slice(None), slice(T), slice(T))
                own = (slice(i * b, i * b + rows), *whole)
                self._generator.set(self._states[i])
                _, keep = drop(x[own].detach(), rate)
                self._states[i] = self._generator.get()
                factors[own] = keep.to(x.dtype) * (1 / (1 - rate))
        return x * factors


class Hashes:
    """What drops on a GPU at one place in the model, by the slots' seeds `(k, 2)` int32."""

    def __init__(self, seeds: Tensor) -> None:
        self.seeds = seeds

    def __call__(self, x: Tensor, p: float | Tensor) -> Tensor:
        """Drop elements of `(k·b, …)`, each slot's at its own rate, `(k,)` or one for all."""
        k = len(self.seeds)
        rates = p if isinstance(p, Tensor) else torch.full((k,), p, device=x.device)
        threshold = (rates.double() * 2**32 - 2**31).clamp(max=2**31 - 1).to(torch.int32)
        rows = x.reshape(k, -1)
        h = torch.arange(rows.shape[1], dtype=torch.int32, device=x.device)[None]
        h = (h ^ self.seeds[:, :1]) * 0x7FEB352D  # an odd factor mixes upwards, the shift downwards
        h = (h ^ ((h >> 15) & 0x1FFFF)) + self.seeds[:, 1:]
        keep = h * (0x846CA68B - 2**32) >= threshold[:, None]
        scale = (1 / (1 - rates)).to(x.dtype)[:, None]
        return torch.where(keep, rows * scale, 0).view(x.shape)


def places(keys: Tensor, out: Tensor) -> None:
    """Fill `out` `(S, k, 2)` with seeds of each place, from each slot's keys `(k, 2)`, int32."""
    S: Any = torch.arange(1, len(out) + 1, dtype=torch.int32, device=out.device)
    h = keys[None] + (S * (GOLDEN - 2**32))[:, None, None]
    for factor, shift in ((0x7FEB352D, 15), (0x846CA68B - 2**32, 13)):
        h = (h ^ ((h >> shift) & (2 ** (32 - shift) - 1))) * factor
    out.copy_(h ^ ((h >> 16) & 0xFFFF))
