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
        rows, slots: `(B, 1)` and `(B, T)`, each token's row and its own slot there.
        filled: slots to attend over; none past it holds a token.
        visible: `(B, 1, T, filled)` to be added to the scores, 0 where a token sees a slot and
            else -inf; None where the call's tokens are all there is.
    """

    rows: Tensor
    slots: Tensor
    filled: int
    visible: Tensor | None


class LayerCache:
    """Keys and values that one attention layer has seen.

    Args:
        kv: `(B, S, 2, H, D)` buffer; a token's key and value lie together, as `c_attn` makes them.
    """

    def __init__(self, kv: Tensor) -> None:
        self.kv = kv

    def write(self, kv: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """Store `kv` `(B, T, 2, H, D)`; gives all keys and values, `(B, H, filled, D)` each."""
        self.kv[place.rows, place.slots] = kv  # a compiler does this in place, unlike a scatter
        k, v = self.kv[:, : place.filled].permute(2, 0, 3, 1, 4)
        return k, v


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
        shape = (batch, slots, 2, config.n_head, config.n_embd // config.n_head)
        self.slots = slots
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)  # (B,) filled slots
        self.layers = [
            LayerCache(torch.zeros(shape, dtype=dtype, device=device))
            for _ in range(config.n_layer)
        ]
        # No row holds more than this many tokens: known on the host, so that attention reads the
        # filled part of the buffers only and asks the device nothing.
        self.filled = 0

    def widen(self) -> None:
        """Let the next token attend over all slots; the mask hides those that are not filled.

        Every step then has the same shapes, as compiled and captured ones must.
        """
        self.filled = self.slots - 1

    def repeat(self, times: int) -> None:
        """Make of every row so many, side by side."""
        self.lengths = self.lengths.repeat_interleave(times)
        for layer in self.layers:
            layer.kv = layer.kv.repeat_interleave(times, 0)

    def reorder(self, rows: Tensor, start: int) -> None:
        """Let row b hold what row `rows[b]` holds; they are alike before slot `start`, and as long.

        Args:
            rows: `(B,)`.
            start: from here on slots are copied.
        """
        for layer in self.layers:
            layer.kv[:, start : self.filled] = layer.kv[rows, start : self.filled]

    def advance(self, positions: Tensor) -> Place:
        """Make room for tokens at `positions` `(B, T)`, which continue the rows."""
        T = positions.shape[1]
        self.filled += T
        self.lengths += T
        visible = None
        if self.filled > T:
            slots = torch.arange(self.filled, device=positions.device)
            hidden = slots > positions[:, None, :, None]
            visible = torch.zeros_like(hidden, dtype=self.layers[0].kv.dtype)
            visible = visible.masked_fill(hidden, -torch.inf)
        rows = torch.arange(len(self.lengths), device=positions.device)[:, None]
        return Place(rows, positions, self.filled, visible)
