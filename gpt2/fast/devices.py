"""What each kind of device can do: every choice that depends on it, each a function of the device.

"cpu", "cuda" and "mps" are known; on any other only what every device can do is asked of it. The
one choice elsewhere is that of `gpt2.fast.dropout`, whose text `lora` has too.
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


def tells_counts(device: torch.device) -> bool:
    """Whether the host knows at once how many elements a mask selects, and need not wait for it."""
    return device.type == "cpu"


def draws_one_by_one(device: torch.device) -> bool:
    """Whether random numbers cost more than the attention that they drop weights of."""
    return device.type == "cpu"


def draws_on(device: torch.device) -> torch.device:
    """Where to draw tokens for a model on `device`: there, or on the CPU if it has no float64."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


def slices_products(device: torch.device) -> bool:
    """Whether the matrix library, MKL, is slow to split a product with few rows over threads."""
    return device.type == "cpu"


def wants_aligned(device: torch.device) -> bool:
    """Whether matrix products are slow where a side in memory is no multiple of 8."""
    return device.type == "cuda"


def fuses_loss(device: torch.device) -> bool:
    """Whether torch.compile makes the loss of a chunk of logits faster."""
    return device.type == "cuda"


def positions_at_a_time(device: torch.device) -> int:
    """Of how many positions a loss is made at once: with more no product would be faster."""
    return 512 if device.type == "cpu" else 2048


def attends_apart(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether one kernel attends within each of many documents, at the cost of their own sizes."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


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
