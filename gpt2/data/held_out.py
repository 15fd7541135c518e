"""Held-out examples, so that no prompt is on both sides."""

from collections.abc import Iterable, Iterator
from hashlib import blake2b

import numpy as np

from gpt2.data.dataset import Dataset
from gpt2.data.examples import Example

Range = tuple[float, float]
ALL: Range = (0.0, 1.0)


def sides(share: float) -> tuple[Range, Range]:
    """What is learnt and what is held out, as ranges of a prompt's hash in [0, 1).

    What is held out of a share is held out of every larger one.
    """
    if not 0 < share < 1:
        raise ValueError(f"A share must be above 0 and below 1, got {share}.")
    return (share, 1.0), (0.0, share)


def is_within(example: Example, side: Range) -> bool:
    """Whether an example is on a side: a function of its prompt alone, or of a whole text."""
    digest = blake2b((example.prompt or example.completion).encode(), digest_size=8).digest()
    return side[0] * 2**64 <= int.from_bytes(digest, "little") < side[1] * 2**64


def within(examples: Iterable[Example], side: Range) -> Iterator[Example]:
    """The examples of a side, in their order; after the last a ValueError if there is none."""
    seen = kept = 0
    for example in examples:
        seen += 1
        if side == ALL or is_within(example, side):
            kept += 1
            yield example
    if seen and not kept:
        which = "to learn" if side[1] == 1 else "to evaluate on"
        raise ValueError(
            f"A share of {seen} examples, taken by a hash of their prompts, leaves none {which}: "
            "choose another share, or give a file."
        )


def without_overlap(held_out: Dataset, learnt: Dataset, name: str = "validation") -> Dataset:
    """The held-out examples whose prompt no learnt example has; an error calls them `name`."""
    keys = np.concatenate([*held_out.prompt_keys()])
    learnt_too = np.any([np.isin(keys, part) for part in learnt.prompt_keys()], axis=0)
    if learnt_too.all():
        raise ValueError(f"Every {name} example has a prompt that is learnt too.")
    return held_out.only(np.flatnonzero(~learnt_too)) if learnt_too.any() else held_out
