"""What each type of device can do, as far as more than one file asks.

"cpu", "cuda" and "mps" are known; of others the least is expected.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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


class Generator:
    """Torch's global generator of one device; none of an unknown one."""

    def __init__(self, device: torch.device) -> None:
        self.get: Callable[[], Tensor | None] = lambda: None
        self.set: Callable[[Any], None] = lambda state: None
        self.seed: Callable[[int], object] = lambda seed: None
        if on_cpu(device):
            self.get, self.set = torch.get_rng_state, torch.set_rng_state
            self.seed = torch.default_generator.manual_seed
        elif on_cuda(device):
            self.get = lambda: torch.cuda.get_rng_state(device)
            self.set = lambda state: torch.cuda.set_rng_state(state, device)
            index = device.index or 0
            self.seed = lambda seed: torch.cuda.default_generators[index].manual_seed(seed)
        elif device.type == "mps":
            self.get, self.set = torch.mps.get_rng_state, torch.mps.set_rng_state
            self.seed = torch.mps.manual_seed
