"""What a run is evaluated on: a share of its data, or a file; and what is said of it."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace

import gpt2
from gpt2.data.held_out import split, without_overlap

Examples = Sequence[gpt2.Example]


def add_options(to: ArgumentParser) -> None:
    """What to evaluate on, and when; when to stop, and to save."""
    said = "file to evaluate on, or a share of the data such as 0.1"
    to.add_argument("--validation", type=str | None, help=said)
    to.add_class_arguments(gpt2.RunConfig, skip={"folder"}, as_group=False)


def apart(examples: Examples, options: Namespace) -> tuple[Examples, Examples, str]:
    """Examples to learn and to evaluate on, none with one prompt; what there is to say of them."""
    wanted = options.validation
    if wanted is None:
        return examples, [], ""
    twice = len(examples) - len({*examples})
    told = f" {twice:,} of the data's {len(examples):,} stand there more than once." * bool(twice)
    if (share := _share(wanted)) is not None:
        learnt, held_out = split(examples, share)
        return learnt, held_out, f" Validation: {len(held_out):,} examples, by their prompts.{told}"
    given = gpt2.read_examples(wanted, options.fields)
    held_out = without_overlap(given, examples)
    if left_out := len(given) - len(held_out):
        told += f" {left_out:,} others have a prompt that is learnt too, and are left out."
    return examples, held_out, f" Validation: {len(held_out):,} examples.{told}"


def _share(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
