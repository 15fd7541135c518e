"""What each type of device can do, as far as more than one file asks.

"cpu", "cuda" and "mps" are known; of others the least is expected.
"""

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import Tensor

_turn = threading.RLock()  # of the thread that has torch's generators


def on_cpu(device: torch.device) -> bool:
    """The host sees every number at once, draws them one by one, and multiplies with MKL."""
    return device.type == "cpu"


def on_cuda(device: torch.device) -> bool:
    """Work can be captured as a graph; kernels like sides that are multiples of 8."""
    return device.type == "cuda"


def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64."""
    return device.type in ("cpu", "cuda")


def has_fused_adamw(device: torch.device) -> bool:
    """Whether AdamW updates all parameters in one call, which no interrupt splits."""
    return device.type in ("cpu", "cuda", "mps")


def skips_found_inf(device: torch.device) -> bool:
    """Whether the fused AdamW does nothing where its flag `found_inf` is 1.

    Elsewhere the host must look before each step. Source: pytorch#186360, on "mps".
    """
    return device.type in ("cpu", "cuda")


def positions_at_a_time(device: torch.device) -> int:
    """Positions of a loss that are computed at once; more would not be faster."""
    return 512 if on_cpu(device) else 2048


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; to a GPU without waiting for what runs there.

    Only memory that is pinned, and that torch's allocator keeps until it was read, can be copied
    while the host goes on.
    """
    if on_cuda(device) and on_cpu(tensor.device):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@contextmanager
def own_generators(device: torch.device) -> Generator[Callable[[int], None]]:
    """Within, torch's global generators are the caller's, who seeds them; then as they were.

    One thread at a time has them. Of an unknown device the CPU's is all.
    """
    generators = [torch.default_generator]
    if on_cuda(device):
        generators.append(torch.cuda.default_generators[device.index or 0])
    elif device.type == "mps":
        generators.append(torch.mps._get_default_mps_generator())

    def seed(number: int) -> None:
        for generator in generators:
            generator.manual_seed(number)

    with _turn:
        states = [generator.get_state() for generator in generators]
        try:
            yield seed
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
