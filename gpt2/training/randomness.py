"""Random numbers of a run's own, so that neither side disturbs the other's."""

from __future__ import annotations

import torch
from torch import Tensor


class RandomState:
    """A context in which torch's global generators are the run's own, and outside the caller's.

    Args:
        seed: where the run's own begin.
        device: whose generator is swapped beside the CPU's.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        devices = ["cpu", device] if device.type == "cuda" else ["cpu"]
        self.inside = [torch.Generator(d).manual_seed(seed).get_state() for d in devices]
        self.outside = self._get()

    def __enter__(self) -> None:
        self.outside = self._get()
        self._set(self.inside)

    def __exit__(self, *_: object) -> None:
        self.inside = self._get()
        self._set(self.outside)

    def _get(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return states

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self.device)
