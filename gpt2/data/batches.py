"""Tokenised examples to batches: padded rows, or whole documents end to end in one row.

Shapes: B batch · T time · S documents of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2.data.plans import Buckets, Counted, Plan, Rows
from gpt2.data.tokens import Array, Dataset, places
from gpt2.fast.devices import copied
from gpt2.loss import IGNORE


@dataclass(frozen=True)
class Batch:
    """Token ids and labels, right-padded: `(B, T)` int64 each, `IGNORE` where nothing is learnt.

    Where documents lie end to end in one row, `documents` `(S + 1,)` int32 says where each begins,
    and where the last ends.
    """

    idx: Tensor
    labels: Tensor
    n_tokens: int  # tokens that are predicted and counted in the loss
    documents: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        documents = None if self.documents is None else copied(self.documents, device)
        return Batch(
            copied(self.idx, device), copied(self.labels, device), self.n_tokens, documents
        )

    def padded(self, rows: int, width: int) -> Batch:
        """The same batch with rows and columns after its own in which nothing is learnt.

        Raises:
            ValueError: it is larger than `(rows, width)`, or a row of documents.
        """
        B, T = self.idx.shape
        if rows < B or width < T:
            raise ValueError(f"A ({B}, {T}) batch does not fit into ({rows}, {width}).")
        if self.documents is not None:
            if (rows, width) == (B, T):
                return self
            raise ValueError("A row of documents has its width when it is made.")
        more = (0, width - T, 0, rows - B)
        return Batch(F.pad(self.idx, more), F.pad(self.labels, more, value=IGNORE), self.n_tokens)


def batches(
    data: Dataset,
    batch_size: int | None = None,
    *,
    seed: int,
    epoch: int,
    start: int = 0,
    tokens_per_batch: int | None = None,
    packing: bool = False,
) -> Iterator[Batch]:
    """One epoch of shuffled batches; the same seed and epoch give the same batches.

    Args:
        data: the examples.
        batch_size: examples a batch, B; the last batch may have fewer.
        seed, epoch: fix the order.
        start: the first batch to give; it costs no more than batch 0.
        tokens_per_batch: tokens a batch at most, padding included, instead of `batch_size`.
        packing: lay documents end to end in one row instead of padding them.

    Raises:
        ValueError: a size below 1, both sizes or none; an example longer than `tokens_per_batch`.
    """
    made = plan(data, batch_size, tokens_per_batch=tokens_per_batch, packing=packing)
    for k in range(start, len(made)):
        yield batch(data, made, k, seed=seed, epoch=epoch)


def plan(
    data: Dataset,
    batch_size: int | None = None,
    *,
    tokens_per_batch: int | None = None,
    packing: bool = False,
) -> Plan:
    """How an epoch falls into batches; arguments and errors as `batches`."""
    given = [size for size in (batch_size, tokens_per_batch) if size is not None]
    if len(given) != 1:
        raise ValueError("Give batch_size or tokens_per_batch, and not both.")
    if given[0] < 1:
        name = "batch_size" if tokens_per_batch is None else "tokens_per_batch"
        raise ValueError(f"{name} must be at least 1, got {given[0]}.")
    if tokens_per_batch is not None:
        return (Rows if packing else Buckets)(data, tokens_per_batch)
    if packing:
        raise ValueError("packing=True takes tokens_per_batch, the length of a row.")
    return Counted(len(data), given[0])


def batch(data: Dataset, plan: Plan, k: int, *, seed: int, epoch: int) -> Batch:
    """Batch k of an epoch."""
    chosen = plan.examples(k, seed=seed, epoch=epoch)
    ids, learnt, lengths = data.take(chosen)
    labels = np.where(learnt, ids, IGNORE)
    if isinstance(plan, Rows):
        return _end_to_end(ids, labels, lengths, plan)
    return _side_by_side(ids, labels, lengths)


def collate(rows: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    """Right-pad examples to one length; what is padding is told by position, never by id."""
    ids, labels = (torch.cat(parts).numpy() for parts in zip(*rows, strict=True))
    return _side_by_side(ids, labels, np.array([len(ids) for ids, _ in rows]))


def _side_by_side(ids: Array, labels: Array, lengths: Array) -> Batch:
    at = np.repeat(np.arange(len(lengths)), lengths), places(lengths)
    idx = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.long, device="cpu")
    wanted = torch.full_like(idx, IGNORE)
    idx.numpy()[at], wanted.numpy()[at] = ids, labels
    return _batch(idx, wanted)


def _end_to_end(ids: Array, labels: Array, lengths: Array, plan: Rows) -> Batch:
    row: Any = np.zeros((2, 1, plan.width), np.int64)
    row[1] = IGNORE
    row[0, 0, : len(ids)], row[1, 0, : len(ids)] = ids, labels
    ends = np.cumsum(lengths)
    row[1, 0, (ends - lengths)] = IGNORE  # no document says how the next begins
    # What is left of the row is documents too, in which nothing is learnt.
    empty = np.arange(1, plan.slots + 1 - len(ends)) * plan.longest + len(ids)
    starts = np.concatenate([[0], ends, np.minimum(empty, plan.width)]).astype(np.int32)
    idx, wanted = torch.from_numpy(row).unbind()
    return _batch(idx, wanted, torch.from_numpy(starts))


def _batch(idx: Tensor, labels: Tensor, documents: Tensor | None = None) -> Batch:
    return Batch(idx, labels, int((labels[:, 1:] != IGNORE).sum()), documents)
