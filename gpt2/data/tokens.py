"""A dataset: token ids of all examples end to end, in memory or on disk.

Shapes: T time · N tokens of several examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2.data.order import mixed
from gpt2.loss import IGNORE

Array = np.ndarray[Any, np.dtype[Any]]
AT_A_TIME = 1 << 16  # examples that are looked at together
IDS_AT_A_TIME = 1 << 24


class Dataset(Sequence[tuple[Tensor, Tensor]]):
    """Tokenised examples: item i is its token ids and its labels, `(T,)` each.

    Args:
        ids: all token ids end to end.
        ends: where each example ends in `ids`.
        ignored: how many of each example's first tokens are not learnt.
        truncated: how many examples were cut to the longest length.
        known: `prompts`, how many of each example's first tokens are its prompt, if that is not
            `ignored`; and what a store has counted: `histogram`, `extremes`, `by_length`,
            `fingerprint`, `repeated`.

    Raises:
        ValueError: arrays that are not integers in a row, or do not end together.
    """

    def __init__(
        self, ids: Array, ends: Array, ignored: Array, truncated: int = 0, **known: Any
    ) -> None:
        _check(ids, ends, ignored)
        self._ids, self._ends, self._ignored = ids, ends, ignored
        self.truncated, self.prompts = truncated, ignored
        vars(self).update(known)

    def __repr__(self) -> str:
        if not len(self):
            return "<Dataset: no examples>"
        size = f"{len(self):,} examples, {self.n_tokens:,} tokens, the longest {self.longest:,}"
        return f"<Dataset: {size}; {self.truncated:,} cut>"

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        ids, learnt, _ = self.take(np.array([i % len(self)]))
        return torch.from_numpy(ids), torch.from_numpy(np.where(learnt, ids, IGNORE))

    def take(self, chosen: Array) -> tuple[Array, Array, Array]:
        """Several examples end to end.

        Args:
            chosen: their numbers, from 0.

        Returns:
            Their token ids, int64, and whether each is learnt, `(N,)`; and each one's length.
        """
        ends = self._ends[chosen]
        starts = np.where(chosen > 0, self._ends[chosen - 1], 0)
        lengths = ends - starts
        within = places(lengths)
        ids = self._ids[within + np.repeat(starts, lengths)].astype(np.int64)
        return ids, within >= np.repeat(self._ignored[chosen], lengths), lengths

    def part(self, first: int, last: int) -> tuple[Array, Array, Array]:
        """Examples `first` to `last`: their ids, where each ends in these, and their prompts."""
        begin, ends = int(self._ends[first - 1]) if first else 0, self._ends[first:last]
        return self._ids[begin : int(ends[-1])], ends - begin, self.prompts[first:last]

    def prompt_keys(self) -> Iterator[Array]:
        """64 bits of each example's prompt, or of one without as a whole; some at a time."""
        for first in range(0, len(self), AT_A_TIME):
            ids, ends, prompts = self.part(first, first + AT_A_TIME)
            lengths = np.diff(ends, prepend=0)
            asked = np.where(prompts > 0, np.minimum(prompts, lengths), lengths)
            yield hashes(ids, lengths, asked)

    def only(self, chosen: Array) -> Dataset:
        """The data of these examples alone, in memory; how many of them were cut is not known."""
        ids, _, lengths = self.take(chosen)
        ignored, prompts = self._ignored[chosen], self.prompts[chosen]
        return Dataset(ids.astype(np.int32), np.cumsum(lengths), ignored, prompts=prompts)

    def supervised(self, chosen: Array) -> Array:
        """How many tokens of each of these examples are learnt, the first of an example never."""
        starts = np.where(chosen > 0, self._ends[chosen - 1], 0)
        unlearnt = np.maximum(self._ignored[chosen], 1)
        return np.maximum(self._ends[chosen] - starts - unlearnt, 0)

    @property
    def lengths(self) -> Array:
        """Tokens of each example: an array of eight bytes for each."""
        return np.diff(self._ends, prepend=0)

    @property
    def n_tokens(self) -> int:
        """Tokens of all examples."""
        return len(self._ids)

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return len(self.histogram) - 1

    @cached_property
    def histogram(self) -> Array:
        """How many examples have 0, 1, 2, … tokens, up to the longest."""
        return np.bincount(self.lengths)

    @cached_property
    def extremes(self) -> tuple[int, int]:
        """The lowest token id and the highest."""
        starts = range(0, len(self._ids), IDS_AT_A_TIME)
        parts = [self._ids[start : start + IDS_AT_A_TIME] for start in starts]
        lowest, highest = (p.min() for p in parts), (p.max() for p in parts)
        return int(min(lowest, default=0)), int(max(highest, default=0))

    @cached_property
    def by_length(self) -> Array:
        """The numbers of all examples, the shortest first."""
        return np.argsort(self.lengths, kind="stable")

    @cached_property
    def repeated(self) -> int:
        """How many examples have the very tokens of an earlier one."""
        parts = (self.part(first, first + AT_A_TIME) for first in range(0, len(self), AT_A_TIME))
        found = [hashes(ids, np.diff(ends, prepend=0)) for ids, ends, _ in parts]
        return len(self) - len(np.unique(np.concatenate(found)))

    @cached_property
    def fingerprint(self) -> str:
        """What tells this data from any other: equal for the same in memory and on disk."""
        digest = Digest()
        for first in range(0, len(self), AT_A_TIME):
            ends = self._ends[first : first + AT_A_TIME]
            begin = int(self._ends[first - 1]) if first else 0
            digest.add(
                self._ids[begin : int(ends[-1])], ends, self._ignored[first : first + len(ends)]
            )
        return digest.hexdigest()


def _check(ids: Array, ends: Array, ignored: Array) -> None:
    """What can be told at once, however many there are."""
    for name, array in (("ids", ids), ("ends", ends), ("ignored", ignored)):
        if np.ndim(array) != 1 or np.asarray(array).dtype.kind not in "iu":
            raise ValueError(f"{name} must be integers along one axis.")
    if len(ends) != len(ignored):
        raise ValueError(f"There are {len(ends)} ends and {len(ignored)} counts of ignored tokens.")
    if (last := int(ends[-1]) if len(ends) else 0) != len(ids):
        raise ValueError(f"The last example ends at {last}, and the ids at {len(ids)}.")


class Digest:
    """A hash of examples, however they were cut into parts."""

    def __init__(self) -> None:
        self.parts = [hashlib.sha256() for _ in range(3)]

    def add(self, *arrays: Array) -> None:
        """More ids, ends and counts of ignored tokens."""
        for part, array in zip(self.parts, arrays, strict=True):
            part.update(np.ascontiguousarray(array, "<i8").data)

    def hexdigest(self) -> str:
        """The hash of all so far."""
        return hashlib.sha256(b"".join(part.digest() for part in self.parts)).hexdigest()


def hashes(ids: Array, lengths: Array, upto: Array | None = None) -> Array:
    """64 bits of each example, which has a token at least, or of its first `upto` tokens."""
    if not len(lengths):
        return np.zeros(0, np.uint64)
    place = places(lengths)
    bits = mixed(ids.astype(np.uint64) ^ (place.astype(np.uint64) << np.uint64(32)))
    if upto is not None:
        bits[place >= np.repeat(upto, lengths)] = 0
    counts = lengths if upto is None else upto
    return mixed(np.add.reduceat(bits, np.cumsum(lengths) - lengths) ^ counts.astype(np.uint64))


def places(lengths: Array) -> Array:
    """The place of each token within its own example: 0 … length-1 for each length."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
