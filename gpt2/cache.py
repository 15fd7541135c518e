"""What a position may attend to: the key-value cache, and the documents of a packed row.

Rows of a cache are right-padded: row b's tokens fill slots 0, 1, 2, … without gaps, and a slot
past a row's length is never attended to.

Shapes: B batch · T time · H heads · D head size · S slots a row, or documents of one.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from gpt2.config import GPT2Config


class Documents(NamedTuple):
    """The documents of one row: where each begins and the last ends, `(S + 1,)` int32."""

    starts: Tensor  # a tensor: other documents need no other graph
    T: int
    longest: int  # none has more tokens

    @classmethod
    def of(cls, idx: Tensor, starts: Tensor, longest: int, cache: object) -> Self:
        """The documents of `idx` `(1, T)`."""
        if cache is not None or idx.dim() != 2 or len(idx) != 1 or starts.dim() != 1:
            raise ValueError(
                "Documents lie in one row, without a cache: give idx (1, T) and documents "
                f"(S + 1,), got {tuple(idx.shape)} and {tuple(starts.shape)}."
            )
        return cls(starts.to(torch.int32), idx.shape[1], longest)

    def numbers(self) -> Tensor:
        """The document of each token, `(T,)`, from 1."""
        at = torch.arange(self.T, dtype=torch.int32, device=self.starts.device)
        return torch.searchsorted(self.starts, at, right=True)

    def positions(self) -> Tensor:
        """The position of each token in its document, `(1, T)`."""
        at = torch.arange(self.T, device=self.starts.device)
        return (at - self.starts[self.numbers() - 1])[None]


# What each position sees: all before it (None); its document; or what a tensor (B, 1, T, N)
# that is added to the scores leaves over.
Mask = Tensor | Documents | None


@dataclass(frozen=True)
class LayerCache:
    """One layer's part of the cache, for the tokens of one call."""

    kv: Tensor  # (B, S, 2, H, D): a token's key and value together, as from `c_attn`
    rows: Tensor  # (B, 1) and
    slots: Tensor  # (B, T), where each of the call's tokens goes
    filled: int  # slots that hold a token, this call's included

    def extend(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Store `kv` `(B, T, 2, H, D)`; gives all keys and values, `(B, H, filled, D)` each."""
        self.kv[self.rows, self.slots] = kv  # in place where compiled
        seen = kv if self.filled == kv.shape[1] else self.kv[:, : self.filled]
        k, v = seen.permute(2, 0, 3, 1, 4)
        return k, v


class KVCache:
    """The keys and values of each layer, of rows with room for `slots` tokens."""

    def __init__(
        self, config: GPT2Config, batch: int, slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (batch, slots, 2, config.n_head, config.n_embd // config.n_head)
        self.slots = slots
        # No row holds more tokens. The host knows it: attention reads the filled slots only, and
        # asks the device nothing.
        self.filled = 0
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        how: Any = {"dtype": dtype, "device": device}
        self.layers = [torch.zeros(shape, **how) for _ in range(config.n_layer)]

    def repeat(self, times: int) -> None:
        """Repeat each row, side by side."""
        self.lengths = self.lengths.repeat_interleave(times)
        self.layers = [kv.repeat_interleave(times, 0) for kv in self.layers]

    def reorder(self, rows: Tensor, start: int) -> None:
        """Let row b hold what row `rows[b]` `(B,)` holds; all are alike before slot `start`."""
        for kv in self.layers:
            kv[:, start : self.filled] = kv[rows, start : self.filled]

    def advance(self, positions: Tensor) -> tuple[Tensor | None, list[LayerCache]]:
        """Make room for tokens at `positions` `(B, T)`: the mask, and each layer's part."""
        T = positions.shape[1]
        self.filled += T
        self.lengths += T
        mask = None
        if self.filled > T:  # else the call's tokens are all there is
            slots = torch.arange(self.filled, device=positions.device)
            hidden = slots > positions[:, None, :, None]
            mask = torch.zeros_like(hidden, dtype=self.layers[0].dtype)
            mask = mask.masked_fill(hidden, -torch.inf)
        rows = torch.arange(len(self.lengths), device=positions.device)[:, None]
        return mask, [LayerCache(kv, rows, positions, self.filled) for kv in self.layers]
