"""Tokenised examples to padded batches, in an order that a seed and the epoch fix.

Shapes: B batch · T time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2.data.tokens import Dataset
from gpt2.fast.devices import copied
from gpt2.training.loss import IGNORE


@dataclass(frozen=True)
class Batch:
    """Token ids and labels, right-padded: `(B, T)` int64 each, `IGNORE` where nothing is learnt."""

    idx: Tensor
    labels: Tensor
    n_tokens: int  # tokens that are predicted and counted in the loss

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(copied(self.idx, device), copied(self.labels, device), self.n_tokens)

    def padded(self, rows: int, width: int) -> Batch:
        """The same batch with rows and columns after its own in which nothing is learnt.

        Raises:
            ValueError: it is larger than `(rows, width)`.
        """
        B, T = self.idx.shape
        if rows < B or width < T:
            raise ValueError(f"A ({B}, {T}) batch does not fit into ({rows}, {width}).")
        more = (0, width - T, 0, rows - B)
        return Batch(F.pad(self.idx, more), F.pad(self.labels, more, value=IGNORE), self.n_tokens)


def batches(data: Dataset, batch_size: int, *, seed: int, epoch: int) -> Iterator[Batch]:
    """One epoch of shuffled batches; the same seed and epoch give the same batches.

    Args:
        data: the examples.
        batch_size: examples a batch, B; the last batch may have fewer.
        seed, epoch: fix the order.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    order = np.random.default_rng((seed, epoch)).permutation(len(data))
    for start in range(0, len(data), batch_size):
        yield collate([data[int(i)] for i in order[start : start + batch_size]])


def collate(rows: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    """Right-pad examples to one length; what is padding is told by position, never by id."""
    width = max(len(ids) for ids, _ in rows)
    idx = torch.zeros(len(rows), width, dtype=torch.long, device="cpu")
    labels = torch.full_like(idx, IGNORE)
    for i, (ids, wanted) in enumerate(rows):
        idx[i, : len(ids)] = ids
        labels[i, : len(ids)] = wanted
    return Batch(idx, labels, int((labels[:, 1:] != IGNORE).sum()))
