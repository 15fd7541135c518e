"""The order of an epoch as a function of a position, with no list of all."""

import math
from hashlib import blake2b
from typing import Any

import numpy as np

Integers = np.ndarray[Any, np.dtype[Any]]
ROUNDS = 10
WHOLE = 1 << 16  # examples up to which an epoch's order is kept


class Order:
    """The order of each epoch of `n` examples, in several streams; of few the last is kept."""

    def __init__(self, n: int, streams: int = 1) -> None:
        self.n, self.streams = n, np.arange(streams)[:, None]
        self._kept: tuple[tuple[int, int], Integers] | None = None

    def at(self, positions: Integers, *, seed: int, epoch: int) -> Integers:
        """What stands at these positions `(N,)` of each permutation, `(streams, N)`."""
        how: Any = {"seed": seed, "epoch": epoch, "stream": self.streams}
        if self.n * len(self.streams) > WHOLE:
            return shuffled(positions, self.n, **how)
        if self._kept is None or self._kept[0] != (seed, epoch):
            self._kept = (seed, epoch), shuffled(np.arange(self.n), self.n, **how)
        return self._kept[1][:, positions]


def shuffled(
    positions: Integers, n: int, *, seed: int, epoch: int, stream: int | Integers = 0
) -> Integers:
    """What stands at these positions of a permutation of 0 … n-1, drawn by seed, epoch and stream.

    A position is a pair, `left` below a and `right` below b, a · b being n or a little more. Each
    round turns one of the two by a hash of the other, which can be undone; so pairs go to pairs
    one to one. Pairs past n go on until they fall below it.

    Source: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 4.
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    keys = [np.uint64(seed_of(seed, epoch, i, ROUNDS)) for i in range(ROUNDS)]
    # As an array even of one: a scalar's sum would warn of the overflow that is meant.
    streams = mixed(np.atleast_1d(np.asarray(stream, np.uint64)))
    placed = positions.astype(np.uint64) + np.zeros_like(streams)
    streams = np.broadcast_to(streams, placed.shape)
    walking = np.ones(placed.shape, bool)
    while walking.any():
        salt = streams[walking]
        left = placed[walking] % np.uint64(a)
        right = placed[walking] // np.uint64(a)
        for one, other in zip(keys[::2], keys[1::2], strict=True):
            left = (left + mixed(right ^ one ^ salt) % np.uint64(a)) % np.uint64(a)
            right = (right + mixed(left ^ other ^ salt) % np.uint64(b)) % np.uint64(b)
        placed[walking] = left + right * np.uint64(a)
        walking = placed >= n
    return placed.astype(np.int64)


def seed_of(*numbers: int) -> int:
    """A 64-bit hash of these integers, the same on every machine."""
    digest = blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def mixed(x: Integers) -> Integers:
    """A 64-bit hash of each element of an array of uint64.

    Source: Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators".
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
