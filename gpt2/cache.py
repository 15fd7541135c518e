"""The key-value cache: what attention has seen, kept between calls.

Rows are right-padded: row b's tokens fill slots 0, 1, 2, … without gaps, so rows of different
lengths need no left padding, and a slot past a row's own length is never attended to.

Shapes: B batch · T time · H heads · D head size · S slots a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2.config import GPT2Config


@dataclass(frozen=True)
class Place:
    """Where the tokens of a call go in the cache, and which slots each of them sees.

    Args:
        slots: `(B, 1, T, 1)`, each token's own slot.
        filled: slots to attend over; none past it holds a token.
        visible: `(B, 1, T, filled)` booleans; None where the call's tokens are all there is.
    """

    slots: Tensor
    filled: int
    visible: Tensor | None


class LayerCache:
    """Keys and values that one attention layer has seen.

    Args:
        k, v: `(B, H, S, D)` buffers.
    """

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    def write(self, k: Tensor, v: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """Store `k` and `v` `(B, H, T, D)`; gives all there are, `(B, H, filled, D)` each."""
        slots = place.slots.expand_as(k)
        self.k.scatter_(2, slots, k)
        self.v.scatter_(2, slots, v)
        return self.k[:, :, : place.filled], self.v[:, :, : place.filled]


class KVCache:
    """One `LayerCache` a block, and how many tokens each row holds.

    Args:
        config: the model's.
        batch: number of rows, B.
        slots: tokens that fit in a row, S; at most `config.block_size`.
        dtype, device: the model's.
    """

    def __init__(
        self,
        config: GPT2Config,
        batch: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if not 1 <= slots <= config.block_size:
            raise ValueError(f"slots must be in 1..{config.block_size} (block_size), got {slots}.")
        shape = (batch, config.n_head, slots, config.n_embd // config.n_head)
        self.slots = slots
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)  # (B,) filled slots
        self.layers = [
            LayerCache(
                torch.zeros(shape, dtype=dtype, device=device),
                torch.zeros(shape, dtype=dtype, device=device),
            )
            for _ in range(config.n_layer)
        ]
        # No row holds more than this many tokens: known on the host, so that attention reads the
        # filled part of the buffers only and asks the device nothing.
        self.filled = 0

    def advance(self, positions: Tensor) -> Place:
        """Make room for tokens at `positions` `(B, T)`, which continue the rows."""
        T = positions.shape[1]
        self.filled += T
        self.lengths += T
        visible = None
        if self.filled > T:
            slots = torch.arange(self.filled, device=positions.device)
            visible = slots <= positions[:, None, :, None]
        return Place(positions[:, None, :, None], self.filled, visible)
