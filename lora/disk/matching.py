"""The parts of which `lora.disk.patterns` makes a test: matching without backtracking.

A part is a function from the set of places in a text where it may begin to the set of places where
it may end. A set of places is one integer: bit i is the place before character i. Nothing is tried
twice and nothing is undone, and the work of one comparison has a bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_WORK = 20_000  # steps that one comparison may take; usual ones take about ten


class Places:
    """One text, with the places where characters stand; each set is found once."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.end = 1 << len(text)
        self.work = 0
        self.known: dict[object, int] = {}

    def of(self, fits: Callable[[str], bool]) -> int:
        """Where a character stands that fits."""
        if fits not in self.known:
            self.known[fits] = sum(1 << i for i, c in enumerate(self.text) if fits(c))
        return self.known[fits]

    def of_word(self, word: str) -> int:
        """Where this word begins."""
        if word not in self.known:
            found, at = 0, self.text.find(word)
            while at >= 0:
                found |= 1 << at
                at = self.text.find(word, at + 1)
            self.known[word] = found
        return self.known[word]

    def count(self) -> None:
        """One step more.

        Raises:
            OverflowError: the comparison takes too long.
        """
        self.work += 1
        if self.work > _WORK:
            raise OverflowError


Step = Callable[[Places, int], int]


def word(text: str) -> Step:
    """These characters, one after the other."""

    def step(places: Places, begins: int) -> int:
        places.count()
        return (begins & places.of_word(text)) << len(text)

    return step


def one(fits: Callable[[str], bool]) -> Step:
    """One character that fits."""

    def step(places: Places, begins: int) -> int:
        places.count()
        return (begins & places.of(fits)) << 1

    return step


def chain(steps: Sequence[Step]) -> Step:
    """Each part where the one before it ends."""

    def step(places: Places, begins: int) -> int:
        for part in steps:
            begins = part(places, begins) if begins else 0
        return begins

    return step


def either(steps: Sequence[Step]) -> Step:
    """Any of the parts."""

    def step(places: Places, begins: int) -> int:
        ends = 0
        for part in steps:
            ends |= part(places, begins)
        return ends

    return step


def repeat(part: Step, low: int, high: int | None) -> Step:
    """The part `low` times or more, up to `high` times; None for any number."""

    def step(places: Places, begins: int) -> int:
        for _ in range(low):
            places.count()
            before, begins = begins, part(places, begins)
            if begins in (0, before):  # more rounds change nothing
                break
        ends = new = begins
        left = None if high is None else high - low
        while new and left != 0:
            places.count()
            new = part(places, new) & ~ends  # what was reached in fewer rounds is done
            ends |= new
            left = None if left is None else left - 1
        return ends

    return step


def ahead(part: Step, wanted: bool) -> Step:
    """Where the part fits, or does not fit, without going on."""

    def step(places: Places, begins: int) -> int:
        stays = 0
        while begins:
            places.count()
            place = begins & -begins
            begins ^= place
            if bool(part(places, place)) is wanted:
                stays |= place
        return stays

    return step


def first(places: Places, begins: int) -> int:
    """`^`"""
    return begins & 1


def last(places: Places, begins: int) -> int:
    """`$`, which also fits before a line break at the end."""
    before_newline = places.end >> 1 if places.text.endswith("\n") else 0
    return begins & (places.end | before_newline)


def edge(of_words: Callable[[str], bool]) -> Step:
    """`\\b`: between a character of a word and another one, or none."""

    def step(places: Places, begins: int) -> int:
        words = places.of(of_words)
        return begins & (words ^ (words << 1))

    return step
