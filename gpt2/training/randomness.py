"""A run's random numbers: a function of seed, step and micro-batch only.

So it does not matter which process takes a micro-batch, or when a run was resumed.
"""

import threading

import torch
from torch import Tensor

from gpt2.data.order import seed_of
from gpt2.fast.devices import Generator

_turn = threading.RLock()  # one thread at a time has torch's generators


class RandomState:
    """A context in which torch's global generators are the run's.

    Args:
        seed: the run's.
        device: whose generator is swapped beside the CPU's.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        kinds = {"cpu": torch.device("cpu"), device.type: device}
        self.generators = [Generator(kind) for kind in kinds.values()]
        self.outside: list[Tensor | None] = []

    def __enter__(self) -> None:
        _turn.acquire()
        self.outside = [generator.get() for generator in self.generators]

    def __exit__(self, *_: object) -> None:
        for generator, state in zip(self.generators, self.outside, strict=True):
            generator.set(state)
        _turn.release()

    def begin(self, step: int, micro_batch: int) -> None:
        """Set the generators to where this micro-batch of this step begins."""
        for generator in self.generators:
            generator.seed(seed_of(self.seed, step, micro_batch))
