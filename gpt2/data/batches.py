"""Tokenised examples to batches: padded rows, or whole documents end to end in one row.

A batch is a function of seed, epoch and number, and each epoch has as many. So a run is resumed
from an integer.

Shapes: B batch · T time · S documents of a row.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2.data.dataset import Array, Dataset
from gpt2.data.order import Integers, Order, shuffled
from gpt2.fast.compiling import bucket
from gpt2.fast.devices import copied
from gpt2.loss import IGNORE

ALIGNED = 8  # widths of buckets are multiples of this: fast on a GPU
SHAPES = 16  # buckets at most, since each width is compiled
ENOUGH = 0.08  # share of padding at which no further bucket is made
RANKS = 32  # spans of a group, each of which counts as its longest and its shortest


@dataclass(frozen=True)
class Batch:
    """Token ids and labels, right-padded."""

    idx: Tensor  # (B, T) int64
    labels: Tensor  # likewise, `IGNORE` where nothing is learnt
    n_tokens: int  # tokens that are predicted and counted in the loss
    documents: Tensor | None = None  # (S + 1,) int32: where each of one row begins, the last ends

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        idx, labels = copied(self.idx, device), copied(self.labels, device)
        documents = None if self.documents is None else copied(self.documents, device)
        return Batch(idx, labels, self.n_tokens, documents)

    def padded(self, rows: int, width: int) -> Batch:
        """The same batch with rows and columns added in which nothing is learnt."""
        B, T = self.idx.shape
        if (rows, width) == (B, T):
            return self  # as every packed row
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
        seed, epoch, start: fix the order; and the first batch to give, at the cost of batch 0.
        tokens_per_batch: tokens a batch at most, padding included, instead of `batch_size`.
        packing: lay documents end to end in one row instead of padding them.

    Raises:
        ValueError: both sizes or none; an example longer than `tokens_per_batch`; a start below 0.
    """
    if start < 0:
        raise ValueError(f"start must be at least 0, got {start}.")
    made = plan(data, batch_size, tokens_per_batch, packing)
    for k in range(start, len(made)):
        yield batch(data, made, k, seed=seed, epoch=epoch)


def plan(
    data: Dataset,
    batch_size: int | None = None,
    tokens_per_batch: int | None = None,
    packing: bool = False,
) -> Plan:
    """How an epoch falls into batches; arguments and errors as `batches`."""
    if batch_size is not None and tokens_per_batch is None and not packing:
        return Counted(len(data), batch_size)
    if batch_size is not None or tokens_per_batch is None:
        raise ValueError("Give batch_size, or tokens_per_batch with packing or without.")
    if tokens_per_batch < data.longest:
        raise ValueError(
            f"tokens_per_batch is {tokens_per_batch} and the longest example has {data.longest} "
            "tokens: raise it, or cut the examples with max_length."
        )
    return (Rows if packing else Buckets)(data, tokens_per_batch)


def batch(data: Dataset, plan: Plan, k: int, *, seed: int, epoch: int) -> Batch:
    """Batch k of an epoch."""
    chosen = plan.examples(k, seed=seed, epoch=epoch)
    return _end_to_end(data, chosen, plan) if isinstance(plan, Rows) else collate(data, chosen)


def collate(data: Dataset, chosen: Array) -> Batch:
    """Right-pad examples to one length; padding is known by position, never by id."""
    ids, learnt, lengths = data.take(chosen)
    at = np.arange(lengths.max()) < lengths[:, None]  # (B, T)
    idx = np.zeros(at.shape, np.int64)
    labels = np.full_like(idx, IGNORE)
    idx[at] = ids
    labels[at] = np.where(learnt, ids, IGNORE)
    n_tokens = int(np.count_nonzero(labels[:, 1:] != IGNORE))
    return Batch(torch.from_numpy(idx), torch.from_numpy(labels), n_tokens)


def _end_to_end(data: Dataset, chosen: Array, plan: Rows) -> Batch:
    ids, learnt, lengths = data.take(chosen)
    ends = np.cumsum(lengths)
    more = (0, plan.width - len(ids))
    learnt[ends - lengths] = False  # no document says how the next begins
    labels = np.where(learnt, ids, IGNORE)
    row = np.stack([np.pad(ids, more), np.pad(labels, more, constant_values=IGNORE)])
    # The rest of the row is documents too, in which nothing is learnt.
    empty = np.arange(1, plan.slots + 1 - len(ends)) * plan.longest + len(ids)
    starts = np.concatenate([[0], ends, np.minimum(empty, plan.width)]).astype(np.int32)
    idx, wanted = torch.from_numpy(row[:, None])
    return Batch(idx, wanted, int(learnt.sum()), torch.from_numpy(starts))


class Counted:
    """Batches of `batch_size` examples, the last of the rest."""

    def __init__(self, n: int, batch_size: int) -> None:
        self.n, self.batch_size, self.order = n, batch_size, Order(n)

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def examples(self, k: int, *, seed: int, epoch: int) -> Integers:
        """The examples of batch k, by number."""
        start = k * self.batch_size
        positions = np.arange(start, min(start + self.batch_size, self.n))
        return self.order.at(positions, seed=seed, epoch=epoch)[0]

    def shape(self, width: int, limit: int) -> tuple[int, int]:
        """Rows and columns, at most `limit`, to pad a batch of this width to: few in all."""
        return min(self.batch_size, self.n), bucket(width, limit)


class Buckets:
    """Batches of examples of about one length, padded to a budget of tokens.

    A bucket is a run of the examples by length that fills its batches, but for the last bucket's
    last. Examples are shuffled within a bucket, and then the batches of all buckets.
    """

    def __init__(self, data: Dataset, tokens: int) -> None:
        self.by_length, upto = data.by_length, np.cumsum(data.histogram)
        self.widths = _widths(data.histogram, tokens)
        self.rows = [tokens // width for width in self.widths]
        self.begins, self.ends = [0], [0]  # of each bucket's examples, and of its batches
        for width, rows in zip(self.widths[:-1], self.rows[:-1], strict=True):
            full = (int(upto[width]) - self.begins[-1]) // rows
            self.begins.append(self.begins[-1] + full * rows)
            self.ends.append(self.ends[-1] + full)
        self.begins.append(len(data))
        self.ends.append(self.ends[-1] - (self.begins[-2] - len(data)) // self.rows[-1])
        self.order = Order(len(self))

    def __len__(self) -> int:
        return self.ends[-1]

    def examples(self, k: int, *, seed: int, epoch: int) -> Integers:
        at = int(self.order.at(np.array([k]), seed=seed, epoch=epoch)[0, 0])
        i = bisect_right(self.ends, at) - 1
        begin, size = self.begins[i], self.begins[i + 1] - self.begins[i]
        first = (at - self.ends[i]) * self.rows[i]
        positions = np.arange(first, min(first + self.rows[i], size))
        picks = shuffled(positions, size, seed=seed, epoch=epoch, stream=i + 1)
        return self.by_length[begin + picks].astype(np.int64)

    def shape(self, width: int, limit: int) -> tuple[int, int]:
        i = bisect_left(self.widths, width)
        return self.rows[i], min(self.widths[i], limit)


class Rows:
    """Whole documents end to end in rows of a budget of tokens; each batch is one row.

    The documents by length are cut into groups of as many as there are rows, and groups into pairs.
    A row takes a short document of one group and a long one of the other. So all rows are about
    equally long, and the longest possible is known.
    """

    def __init__(self, data: Dataset, tokens: int) -> None:
        self.by_length, self.n, self.longest = data.by_length, len(data), data.longest
        ends = np.cumsum(data.histogram)
        self.count = -(-data.n_tokens // tokens)
        while (needed := self._longest_row(ends)) > tokens:
            self.count = max(self.count + 1, self.count * needed // tokens)
        self.width = min(tokens, -(-needed // 64) * 64)
        groups = -(-self.n // self.count)
        self.order = Order(self.count, streams=-(-groups // 2))
        # Documents of nothing fill up a row, none longer than the longest.
        self.slots = groups + 1 + -(-(self.width - needed) // self.longest)

    def __len__(self) -> int:
        return self.count

    def examples(self, k: int, *, seed: int, epoch: int) -> Integers:
        ranks = self.order.at(np.array([k]), seed=seed, epoch=epoch)  # (pairs, 1)
        at = self._ranked(ranks).ravel()
        return self.by_length[np.sort(at[at >= 0])].astype(np.int64)

    def shape(self, width: int, limit: int) -> tuple[int, int]:
        return 1, self.width

    def _ranked(self, ranks: Integers) -> Integers:
        """The examples of each pair's ranks `(pairs, N)`, numbered by length, in the longer group
        and in the shorter: `(2, pairs, N)`; below 0 for none."""
        tops = self.n - 2 * self.count * np.arange(len(ranks))[:, None]  # past each pair's last
        return np.stack([tops - self.count + ranks, tops - self.count - 1 - ranks])

    def _longest_row(self, ends: Integers) -> int:
        """Tokens that no row is longer than."""
        pairs = -(-self.n // (2 * self.count))
        spans = np.unique(np.linspace(0, self.count, RANKS + 1).astype(np.int64))
        firsts, lasts = np.tile(spans[:-1], (pairs, 1)), np.tile(spans[1:] - 1, (pairs, 1))
        at = np.stack([self._ranked(lasts)[0], self._ranked(firsts)[1]])
        return int(np.searchsorted(ends, at, "right").sum(0).max(1).sum())


Plan = Counted | Buckets | Rows
"""How an epoch falls into batches."""


def _widths(counts: Integers, tokens: int) -> list[int]:
    """The widths of the buckets, as few as make little padding."""
    longest = len(counts) - 1
    edges = np.append(np.arange(0, longest, ALIGNED), min(tokens, -(-longest // ALIGNED) * ALIGNED))
    below = np.cumsum(counts)[np.minimum(edges, longest)]  # examples that an edge has room for
    real = int((counts * np.arange(longest + 1)).sum())
    earlier = np.tri(len(edges), k=-1).T > 0  # (edge before, edge)
    # cost: padded tokens up to each edge, in the best buckets that end there
    cost = np.where(edges == 0, 0.0, np.inf)
    befores: list[Integers] = []
    while cost[-1] * (1 - ENOUGH) > real and len(befores) < min(SHAPES, len(edges) - 1):
        table = np.where(earlier, cost[:, None] + (below - below[:, None]) * edges, np.inf)
        befores.append(table.argmin(0))
        cost = table.min(0)
    widths: list[int] = []
    at = len(edges) - 1
    for before in reversed(befores):
        widths.append(int(edges[at]))
        at = int(before[at])
    return widths[::-1]
