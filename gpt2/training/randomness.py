"""A run's random numbers: a function of seed, step and micro-batch only.

So it does not matter which process takes a micro-batch, or when a run was resumed.
"""

import threading
from collections.abc import Generator
from contextlib import contextmanager

import torch

from gpt2.data.order import seed_of
from gpt2.fast import devices

_turn = threading.RLock()  # one thread at a time has torch's generators


class RandomState:
    """A run's use of torch's generators, the CPU's and the device's."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        kinds = {"cpu": torch.device("cpu"), device.type: device}
        self.generators = [devices.Generator(kind) for kind in kinds.values()]

    @contextmanager
    def in_force(self) -> Generator[None]:
        """Within, torch's global generators are the run's; after it, as they were."""
        with _turn:
            outside = [generator.get() for generator in self.generators]
            try:
                yield
            finally:
                for generator, state in zip(self.generators, outside, strict=True):
                    generator.set(state)

    def begin(self, step: int, micro_batch: int) -> None:
        """Set the generators to where this micro-batch of this step begins."""
        for generator in self.generators:
            generator.seed(seed_of(self.seed, step, micro_batch))
