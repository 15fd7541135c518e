"""The order of an epoch as a function: which example stands at a position, with no list of all."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpt2.training.randomness import seed_of

Integers = np.ndarray[Any, np.dtype[np.int64]]
ROUNDS = 10


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
    streams = np.broadcast_to(mixed(np.asarray(stream, np.uint64)), positions.shape)
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


def mixed(x: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """64 bits, each of which depends on all of `x`.

    Source: Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators".
    """
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
