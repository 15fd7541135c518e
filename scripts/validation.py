"""What a run is evaluated on: a share of its data, or a file; and what is said of it."""

from __future__ import annotations

from dataclasses import dataclass

from jsonargparse import ArgumentParser, Namespace

import gpt2
from gpt2.data.held_out import Range, is_within, sides, without_overlap
from inputs import Reader, Source, source


@dataclass(frozen=True)
class Apart:
    """Data to learn and data to evaluate on, none with one prompt; what there is to say of them."""

    learnt: gpt2.Dataset
    held_out: gpt2.Dataset | None
    told: str


def add_options(to: ArgumentParser) -> None:
    """What to evaluate on, and when; when to stop, and to save."""
    said = "file to evaluate on, or a share of the data such as 0.1"
    to.add_argument("--validation", type=str | None, help=said)
    to.add_class_arguments(gpt2.RunConfig, skip={"folder"}, as_group=False)


def share(options: Namespace) -> tuple[Range, Range] | None:
    """The sides of a share that is asked for; None where no share is.

    Raises:
        ValueError: it is out of range.
    """
    try:
        wanted = float(options.validation)
    except (TypeError, ValueError):
        return None
    return sides(wanted)


def apart(given: Source, reader: Reader) -> Apart:
    """A source's data to learn, and what it is evaluated on."""
    options = reader.options
    if options.validation is None:
        return Apart(reader.encode(given), None, "")
    if both := share(options):
        learnt, held_out = (reader.encode(given, side) for side in both)
        said, repeated = ", by their prompts", learnt.repeated + held_out.repeated
        n, left_out = len(learnt) + len(held_out), 0
    else:
        learnt, file = reader.encode(given), reader.encode(source(options.validation, options))
        held_out = without_overlap(file, learnt)
        n, repeated, said, left_out = len(learnt), learnt.repeated, "", len(file) - len(held_out)
    told = f" Validation: {len(held_out):,} examples{said}."
    if repeated:
        told += f" {repeated:,} of the data's {n:,} stand there more than once."
    if left_out:
        told += f" {left_out:,} others have a prompt that is learnt too, and are left out."
    return Apart(learnt, held_out, told)


def learnt_texts(given: Source, options: Namespace) -> list[gpt2.Example]:
    """The examples of a source that are learnt, as far as they are read."""
    both = share(options)
    return [e for e in given.examples if not both or is_within(e, both[0])]
