"""The order of an epoch as a function: which example stands at a position, with no list of all."""

from __future__ import annotations

import math
from hashlib import blake2b
from typing import Any

import numpy as np

Integers = np.ndarray[Any, np.dtype[np.int64]]
ROUNDS = 10
WHOLE = 1 << 16  # examples up to which an epoch's order is kept, since looking is then cheap


class Order:
    """The order of each epoch; of few examples the last one asked for is kept.

    Args:
        n: how many examples there are.
        streams: how many permutations of them.
    """

    def __init__(self, n: int, streams: int = 1) -> None:
        self.n, self.streams = n, streams
        self._kept: tuple[tuple[int, int], Integers] | None = None

    def at(self, positions: Integers, *, seed: int, epoch: int) -> Integers:
        """What stands at these positions `(N,)` of each permutation, `(streams, N)`."""
        if self.n * self.streams > WHOLE:
            return self._found(positions, seed, epoch)
        if self._kept is None or self._kept[0] != (seed, epoch):
            self._kept = (seed, epoch), self._found(np.arange(self.n), seed, epoch)
        return self._kept[1][:, positions]

    def _found(self, positions: Integers, seed: int, epoch: int) -> Integers:
        streams = np.repeat(np.arange(self.streams), len(positions))
        places = np.tile(positions, self.streams)
        found = shuffled(places, self.n, seed=seed, epoch=epoch, stream=streams)
        return found.reshape(self.streams, len(positions))


def shuffled(
    positions: Integers, n: int, *, seed: int, epoch: int, stream: int | Integers = 0
) -> Integers:
    """What stands at these positions of a permutation of 0 … n-1, drawn by seed, epoch and stream.

    A position is a pair, `left` below a and `right` below b, a · b being n or a little more. Each
    round turns one of the two by a hash of the other, which can be undone; so pairs go to pairs
    one to one. Pairs past n go on until they fall below it.

    Args:
        positions: in [0, n).
        n: how many there are.
        seed, epoch: of the run.
        stream: tells permutations of one epoch apart; one for all positions, or one for each.

    Source: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 4.
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    keys = [np.uint64(seed_of(seed, epoch, i, ROUNDS)) for i in range(ROUNDS)]
    # As an array even of one: a scalar's sum would warn of the overflow that is meant.
    streams = np.broadcast_to(mixed(np.atleast_1d(np.asarray(stream, np.uint64))), positions.shape)
    found = positions.astype(np.uint64)
    walking = np.ones(positions.shape, bool)
    while walking.any():
        own = streams[walking]
        left, right = found[walking] % np.uint64(a), found[walking] // np.uint64(a)
        for one, other in zip(keys[::2], keys[1::2], strict=True):
            left = (left + mixed(right ^ one ^ own) % np.uint64(a)) % np.uint64(a)
            right = (right + mixed(left ^ other ^ own) % np.uint64(b)) % np.uint64(b)
        found[walking] = left + right * np.uint64(a)
        walking = found >= n
    return found.astype(np.int64)


def seed_of(*numbers: int) -> int:
    """64 bits that these integers fix on every machine, unlike those of any other integers."""
    digest = blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def mixed(x: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """64 bits for each of an array, each of which depends on all of its own `x`.

    Source: Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators".
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
