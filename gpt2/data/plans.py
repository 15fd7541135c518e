"""Which examples make which batch of an epoch: functions of seed, epoch and the batch's number.

A plan holds a handful of numbers, whatever the number of examples, and each epoch has as many
batches as any other. So a run goes on from an integer.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import Any, Protocol

import numpy as np

from gpt2.data.order import Integers, Order, shuffled
from gpt2.data.tokens import Dataset
from gpt2.fast.compiling import bucket

ALIGNED = 8  # widths of buckets are multiples of this, which a GPU's matrix units like
SHAPES = 16  # buckets at most, since each width is compiled
ENOUGH = 0.08  # share of padding at which no further bucket is made
RANKS = 32  # spans of a group's examples, each of which counts as its longest and its shortest


class Plan(Protocol):
    """How an epoch falls into batches."""

    def __len__(self) -> int:
        """Batches of an epoch."""
        ...

    def examples(self, k: int, *, seed: int, epoch: int) -> Integers:
        """The examples of batch k, by number."""
        ...

    def shape(self, width: int, limit: int) -> tuple[int, int]:
        """Rows and columns, at most `limit`, to pad a batch of this width to: few in all."""
        ...


class Counted:
    """Batches of so many examples each, the last of the rest."""

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
        """Rows and columns to pad a batch to."""
        return min(self.batch_size, self.n), bucket(width, limit)


class Buckets:
    """Batches of examples of about one length, padded to at most so many tokens.

    Each bucket is a run of the examples by length that fills its batches, the last bucket's last
    one left out. Within a bucket examples are shuffled, and then the batches of all buckets.
    """

    def __init__(self, data: Dataset, tokens: int) -> None:
        _check(data, tokens)
        self.by_length, self.n = data.by_length, len(data)
        upto = np.cumsum(data.histogram)
        self.widths = _widths(data.histogram, tokens)
        self.rows = [tokens // width for width in self.widths]
        self.begins, self.ends = [0], [0]  # of each bucket's examples, and of its batches
        for width, rows in zip(self.widths[:-1], self.rows[:-1], strict=True):
            full = (int(upto[width]) - self.begins[-1]) // rows
            self.begins.append(self.begins[-1] + full * rows)
            self.ends.append(self.ends[-1] + full)
        self.begins.append(self.n)
        self.ends.append(self.ends[-1] - (self.begins[-2] - self.n) // self.rows[-1])
        self.order = Order(len(self))

    def __len__(self) -> int:
        return self.ends[-1]

    def examples(self, k: int, *, seed: int, epoch: int) -> Integers:
        """The examples of batch k, by number."""
        at = int(self.order.at(np.array([k]), seed=seed, epoch=epoch)[0, 0])
        i = bisect_right(self.ends, at) - 1
        begin, size = self.begins[i], self.begins[i + 1] - self.begins[i]
        first = (at - self.ends[i]) * self.rows[i]
        places = np.arange(first, min(first + self.rows[i], size))
        own = shuffled(places, size, seed=seed, epoch=epoch, stream=i + 1)
        return self.by_length[begin + own].astype(np.int64)

    def shape(self, width: int, limit: int) -> tuple[int, int]:
        """Rows and columns to pad a batch to."""
        i = bisect_left(self.widths, width)
        return self.rows[i], min(self.widths[i], limit)


class Rows:
    """Whole documents end to end in rows of at most so many tokens; each batch is one row.

    The documents by length are cut into groups of as many as there are rows, and groups into pairs
    of neighbours. Each row gets one of each group: for a pair it draws a rank, which counts from
    the short end in one group and from the long end in the other. So all rows are about equally
    long, and the longest that can be is known.
    """

    def __init__(self, data: Dataset, tokens: int) -> None:
        _check(data, tokens)
        self.by_length, self.n, self.longest = data.by_length, len(data), data.longest
        ends = np.cumsum(data.histogram)
        self.count, needed = -(-data.n_tokens // tokens), tokens + 1
        while needed > tokens:
            needed = self._longest_row(ends)
            if needed > tokens:
                self.count = max(self.count + 1, self.count * needed // tokens)
        self.width = min(tokens, -(-needed // 64) * 64)
        self.groups = -(-self.n // self.count)
        self.order = Order(self.count, streams=-(-self.groups // 2))
        # What a row lacks is filled with documents of nothing, none longer than the longest.
        self.slots = self.groups + 1 + -(-(self.width - needed) // self.longest)

    def __len__(self) -> int:
        return self.count

    def examples(self, k: int, *, seed: int, epoch: int) -> Integers:
        """The examples of batch k, by number."""
        ranks = self.order.at(np.array([k]), seed=seed, epoch=epoch)  # (pairs, 1)
        places = self._places(ranks).ravel()
        return self.by_length[np.sort(places[places >= 0])].astype(np.int64)

    def shape(self, width: int, limit: int) -> tuple[int, int]:
        """The one row that there is."""
        return 1, self.width

    def _places(self, ranks: Integers) -> Integers:
        """Where the examples of each pair's ranks `(pairs, N)` stand by length; below 0 for none.

        Returns:
            `(2, pairs, N)`: in the group of the longer ones, and in that of the shorter.
        """
        tops = self.n - 2 * self.count * np.arange(len(ranks))[:, None]  # past each pair's last
        return np.stack([tops - self.count + ranks, tops - self.count - 1 - ranks])

    def _longest_row(self, ends: Integers) -> int:
        """Tokens that no row is longer than."""
        pairs = -(-self.n // (2 * self.count))
        spans = np.unique(np.linspace(0, self.count, RANKS + 1).astype(np.int64))
        firsts, lasts = np.tile(spans[:-1], (pairs, 1)), np.tile(spans[1:] - 1, (pairs, 1))
        places = np.stack([self._places(lasts)[0], self._places(firsts)[1]])
        return int(np.searchsorted(ends, places, "right").sum(0).max(1).sum())


def _check(data: Dataset, tokens: int) -> None:
    if tokens < data.longest:
        raise ValueError(
            f"tokens_per_batch is {tokens} and the longest example has {data.longest} tokens: "
            "raise it, or cut the examples with max_length."
        )


def _widths(counts: np.ndarray[Any, np.dtype[np.int64]], tokens: int) -> list[int]:
    """The widths of the buckets that make the least padding, and no more of them than it takes."""
    longest = len(counts) - 1
    edges = np.append(np.arange(ALIGNED, longest, ALIGNED), -(-longest // ALIGNED) * ALIGNED)
    edges[-1] = min(edges[-1], tokens)
    edges = np.append(0, edges)
    below = np.cumsum(counts)[np.minimum(edges, longest)]  # examples that an edge has room for
    real = int((counts * np.arange(longest + 1)).sum())
    earlier = np.tri(len(edges), k=-1).T > 0  # (edge before, edge)
    # cost: tokens up to each edge, padding included, in the best buckets of which it ends the last
    cost = np.where(edges == 0, 0.0, np.inf)
    befores: list[Integers] = []
    while cost[-1] * (1 - ENOUGH) > real and len(befores) < min(SHAPES, len(edges) - 1):
        table = cost[:, None] + (below[None] - below[:, None]) * edges[None]
        before = np.where(earlier, table, np.inf).argmin(0)
        cost = np.where(edges == 0, np.inf, table[before, np.arange(len(edges))])
        befores.append(before)
    widths, at = list[int](), len(edges) - 1
    for before in reversed(befores):
        widths.append(int(edges[at]))
        at = int(before[at])
    return widths[::-1]
