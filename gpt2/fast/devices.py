"""What each kind of device can do: every choice that depends on it, each a function of the device.

"cpu", "cuda" and "mps" are known; on any other only what every device can do is asked of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor


def can_capture(device: torch.device) -> bool:
    """Whether the same work can be captured once and replayed, as a CUDA graph."""
    return device.type == "cuda"


def has_fused_adamw(device: torch.device) -> bool:
    """Whether AdamW updates all parameters in one call, so that no interrupt comes in between."""
    return device.type in ("cpu", "cuda", "mps")


def heeds_found_inf(device: torch.device) -> bool:
    """Whether the fused AdamW does nothing where its flag `found_inf` is 1.

    Elsewhere the host must look before each step. Source: pytorch#186360, on "mps".
    """
    return device.type in ("cpu", "cuda")


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; to a GPU without waiting for what runs there.

    Only memory that is pinned, and that torch's allocator keeps until it was read, can be copied
    while the host goes on.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Generator:
    """Torch's global generator of one device: its state, which can be set, and its seed.

    Args:
        device: "cpu", "cuda" or "mps"; any other has none that is known, and is left alone.
    """

    def __init__(self, device: torch.device) -> None:
        self.get: Callable[[], Tensor | None] = lambda: None
        self.set: Callable[[Any], None] = lambda state: None
        self.seed: Callable[[int], object] = lambda seed: None
        if device.type == "cpu":
            self.get, self.set = torch.get_rng_state, torch.set_rng_state
            self.seed = torch.default_generator.manual_seed
        elif device.type == "cuda":
            self.get = lambda: torch.cuda.get_rng_state(device)
            self.set = lambda state: torch.cuda.set_rng_state(state, device)
            self.seed = lambda seed: _cuda_generator(device).manual_seed(seed)
        elif device.type == "mps":
            self.get, self.set = torch.mps.get_rng_state, torch.mps.set_rng_state
            self.seed = torch.mps.manual_seed


def _cuda_generator(device: torch.device) -> torch.Generator:
    index: int | None = device.index
    return cast(Any, torch.cuda).default_generators[index or 0]
