"""What a run is evaluated on: shares of its data, or files; and what is said of it."""

from __future__ import annotations

from dataclasses import dataclass

from jsonargparse import ArgumentParser, Namespace

import gpt2
from gpt2.data.held_out import Range, is_within, sides, without_overlap

from .inputs import Reader, Source, source

KINDS = ("validation", "test")


@dataclass(frozen=True)
class Apart:
    """Data to learn, to evaluate on and to test, no prompt in two; what there is to say of them."""

    learnt: gpt2.Dataset
    held_out: gpt2.Dataset | None
    tested: gpt2.Dataset | None
    told: str


def add_options(to: ArgumentParser) -> None:
    """What to evaluate on, and what to keep for the very end."""
    said = "file to evaluate on, or a share of the data such as 0.1"
    to.add_argument("--validation", type=str | None, help=said)
    last = "file, or a share, that decides nothing: the result alone is evaluated on it"
    to.add_argument("--test", type=str | None, help=last)


def shares(options: Namespace) -> dict[str, Range]:
    """The sides of the shares that are asked for, and what is `learnt`: ranges of a prompt's hash.

    Raises:
        ValueError: one is out of range, or nothing is left to learn.
    """
    found, taken = dict[str, Range](), 0.0
    for name in reversed(KINDS):  # the same test data, whatever is evaluated on
        wanted = _number(options[name])
        if wanted is not None:
            sides(wanted)  # raises where it is out of range
            found[name] = (taken, taken + wanted)
            taken += wanted
    if taken >= 1:
        raise ValueError(f"validation and test take {taken:g} of the data and leave none to learn.")
    return {**found, "learnt": (taken, 1.0)}


def apart(given: Source, reader: Reader) -> Apart:
    """A source's data to learn, and what it is evaluated on."""
    options = reader.options
    both = shares(options)
    own = {name: reader.encode(given, side) for name, side in both.items()}
    n, repeated = sum(map(len, own.values())), sum(data.repeated for data in own.values())
    told, left_out = "", 0
    for name in KINDS:
        if options[name] is None:
            continue
        if name not in own:
            file = reader.encode(source(options[name], options))
            found = file
            for seen in own.values():
                found = without_overlap(found, seen, name)
            own[name], left_out = found, left_out + len(file) - len(found)
        by = ", by their prompts" if name in both else ""
        told += f" {name.capitalize()}: {len(own[name]):,} examples{by}."
    if told and repeated:
        told += f" {repeated:,} of the data's {n:,} stand there more than once."
    if left_out:
        told += f" {left_out:,} others have a prompt that is learnt too, and are left out."
    return Apart(own["learnt"], own.get("validation"), own.get("test"), told)


def learnt_texts(given: Source, options: Namespace) -> list[gpt2.Example]:
    """The examples of a source that are learnt, as far as they are read."""
    side = shares(options)["learnt"]
    return [e for e in given.examples if is_within(e, side)]


def test(model: gpt2.GPT2, apart: Apart, reader: Reader) -> dict[str, dict[str, float]]:
    """The loss of what was trained on the test data, if there is any; shown too."""
    if apart.tested is None:
        return {}
    found = gpt2.evaluate(model, apart.tested, autocast=reader.options.autocast)
    reader.console.print(f"Test: loss {found.loss:.4f}, perplexity {found.perplexity:,.2f}")
    return {"test": {"loss": found.loss, "tokens": found.tokens}}


def _number(given: str | None) -> float | None:
    try:
        return float(given)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        return None
