"""Examples kept apart from those that are learnt, so that no prompt is on both sides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

from gpt2.data.examples import Example


def is_held_out(example: Example, share: float) -> bool:
    """Whether an example is of the share that is held out: a function of its prompt alone.

    Args:
        example: its prompt decides; of a text that is learnt as a whole, the text.
        share: in (0, 1); what is in a share is in every larger one.
    """
    digest = blake2b(_key(example).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def split(examples: Iterable[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Examples to learn and examples that are held out, in their order.

    Raises:
        ValueError: the share is out of range, or leaves no example on a side.
    """
    if not 0 < share < 1:
        raise ValueError(f"A share must be above 0 and below 1, got {share}.")
    sides: tuple[list[Example], list[Example]] = [], []
    for example in examples:
        sides[is_held_out(example, share)].append(example)
    if not all(sides):
        which = "to learn" if sides[1] else "to evaluate on"
        raise ValueError(
            f"A share of {share} of {len(sides[0]) + len(sides[1])} examples, taken by a hash of "
            f"their prompts, leaves none {which}: choose another share, or give a file."
        )
    return sides


def without_overlap(held_out: Sequence[Example], learnt: Iterable[Example]) -> list[Example]:
    """Those examples whose prompt no learnt example has.

    Raises:
        ValueError: there are none.
    """
    keys = {_key(example) for example in learnt}
    kept = [example for example in held_out if _key(example) not in keys]
    if not kept:
        raise ValueError("Every validation example has a prompt that is learnt too.")
    return kept


def _key(example: Example) -> str:
    return example.prompt or example.completion
