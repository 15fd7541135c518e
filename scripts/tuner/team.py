"""The processes of a search: each trains trials of its own, and all know what came out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Team:
    """Which process has what.

    Args:
        rank, size: this one's number, and how many there are.
        gather: gives what every process gave, in the order of their numbers.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda own: [own]

    def has(self, number: int) -> bool:
        """Whether what bears this number is this process's."""
        return number % self.size == self.rank

    def own(self, name: str) -> str:
        """The name of a file of this process's own."""
        return name if self.size == 1 else f"{name}-of-process-{self.rank}"

    def waves(self, numbers: Sequence[int], slots: int) -> tuple[int, list[list[int]]]:
        """How many slots are needed, and the numbers wave by wave, each in order.

        A process has at most so many slots; a number stays with its process.
        """
        each = [[n for n in numbers if n % self.size == rank] for rank in range(self.size)]
        most = max(map(len, each))
        k = min(slots, most)
        return k, [
            sorted(n for own in each for n in own[first : first + k]) for first in range(0, most, k)
        ]
