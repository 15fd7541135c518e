"""Examples to token ids: many at a time, since a tokenizer that is called once is fastest.

Shapes: N tokens of several examples.
"""

from __future__ import annotations

import os
import reprlib
from array import array
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from gpt2.data.examples import SHOWN, Example
from gpt2.data.tokens import Array, Dataset, hashes, places

AT_A_TIME, LETTERS = 4096, 2**20  # examples that are encoded together, and about their letters
THREADS = 8  # at most


class Encoder(Protocol):
    """What turns text into token ids; `gpt2.Tokenizer` is one."""

    @property
    def eos(self) -> int:
        """The id that ends a text."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of an ordinary text."""
        ...


@dataclass(frozen=True)
class Options:
    """How examples become ids, as `encode` has it."""

    max_length: int = 1024
    eos: bool = True
    answer_only: bool = False
    separator: int | None = None


@dataclass(frozen=True)
class Block:
    """Some examples: ids end to end, `(N,)`, and of each its length and its prompt's.

    `reached` is the share of their file that lies before their end, where it is known.
    """

    ids: Array
    lengths: Array
    prompts: Array
    truncated: int
    reached: float | None = None

    @cached_property
    def hashes(self) -> Array:
        """64 bits of each example."""
        return hashes(self.ids, self.lengths)


def encode(
    examples: Iterable[Example | str],
    tokenizer: Encoder,
    *,
    max_length: int = 1024,
    eos: bool = True,
    answer_only: bool = False,
    separator: int | None = None,
) -> Dataset:
    """Tokenise examples; a string is learnt as a whole.

    Prompt and completion are tokenised apart, as they are when a model continues the prompt.

    Args:
        examples: any number, read once.
        tokenizer: as `gpt2.Tokenizer`.
        max_length: tokens an example at most; a longer one is cut and counted in `truncated`.
        eos: end each example with the end-of-text token, and learn to write it.
        answer_only: learn the completion, not the prompt.
        separator: a token id between prompt and completion, as the prompt's last; give it to the
            model at the end of each prompt.

    Raises:
        ValueError: no examples, one string for all, `max_length` below 2, a separator that is no
            id, or listing the examples (by number, from 1) that are left without a token to learn.
    """
    ids, ends, prompts, truncated = array("i"), array("q"), array("i"), 0
    for block in blocks(examples, tokenizer, Options(max_length, eos, answer_only, separator)):
        ends.frombytes((len(ids) + np.cumsum(block.lengths)).tobytes())
        ids.frombytes(block.ids.tobytes())
        prompts.frombytes(block.prompts.tobytes())
        truncated += block.truncated
    held = (np.frombuffer(ids, np.int32), np.frombuffer(ends, np.int64))
    asked = np.frombuffer(prompts, np.int32)
    return Dataset(*held, ignored(asked, answer_only), truncated, prompts=asked)


def ignored(prompts: Array, answer_only: bool) -> Array:
    """How many tokens of each example are not learnt, given those of its prompt."""
    return prompts if answer_only else np.broadcast_to(np.int32(0), prompts.shape)


def blocks(
    examples: Iterable[Example | str], tokenizer: Encoder, options: Options
) -> Generator[Block]:
    """The examples encoded, some thousands at a time, in order; errors as `encode`."""
    check(tokenizer, options)
    _check_several(examples)
    return checked(_in_threads(_texts(examples), tokenizer, options), options)


def checked(found: Iterable[Block], options: Options) -> Generator[Block]:
    """The same blocks; then the errors that `encode` promises of all of them."""
    untaught, shown, number = 0, list[str](), 0
    for block in found:
        # The first token of an example is never predicted.
        unlearnt = ignored(block.prompts, options.answer_only)
        bad = np.flatnonzero(block.lengths <= np.maximum(unlearnt, 1))
        untaught += len(bad)
        shown += [str(number + int(i) + 1) for i in bad[: SHOWN - len(shown)]]
        number += len(block.lengths)
        yield block
    if untaught:
        listed = ", ".join(shown) + ("…" if untaught > SHOWN else "")
        raise ValueError(
            f"{untaught} examples leave no token to learn within {options.max_length}: {listed}. "
            "Remove them, or raise max_length."
        )
    if not number:
        raise ValueError("There are no examples.")


def check(tokenizer: object, options: Options) -> None:
    """The errors that `encode` promises of its options."""
    longest = options.max_length
    if type(longest) is not int or longest < 2:
        raise ValueError(f"max_length must be at least 2, and whole, got {longest!r}.")
    if options.separator is not None and not (
        type(options.separator) is int and 0 <= options.separator < 2**31
    ):
        raise ValueError(f"separator must be a token id, or None, got {options.separator!r}.")
    booleans = type(options.eos) is type(options.answer_only) is bool
    if not hasattr(tokenizer, "encode") or not booleans:
        raise ValueError(
            "Give a tokenizer such as gpt2.Tokenizer(), and True or False for options."
        )


def _check_several(examples: object) -> None:
    if isinstance(examples, str | Example):
        kind = "string" if type(examples) is str else "Example"
        raise ValueError(f"examples is one {kind}, {str(examples)[:20]!r}…: give a list of them.")
    kind = type(examples)
    if issubclass(kind, Mapping) or not issubclass(kind, Iterable):  # its keys are no examples
        raise ValueError(f"examples must be several, got {kind.__name__}.")


def _texts(examples: Iterable[Example | str]) -> Iterator[list[str]]:
    """The prompts and completions of some examples, in turns."""
    texts, letters = list[str](), 0
    for number, example in enumerate(examples, 1):
        prompt, completion = _two(example, number)
        texts += (prompt, completion)
        letters += len(prompt) + len(completion)
        if len(texts) >= 2 * AT_A_TIME or letters >= LETTERS:
            yield texts
            texts, letters = list[str](), 0
    if texts:
        yield texts


def _two(found: object, number: int) -> tuple[str, str]:
    if isinstance(found, str):
        return "", found
    if not isinstance(found, Example):
        raise ValueError(
            f"Example {number} is a {type(found).__name__}: give a string, which is learnt as a "
            "whole, or gpt2.Example(prompt, completion)."
        )
    if {type(found.prompt), type(found.completion)} != {str}:
        raise ValueError(f"Example {number} must hold two strings, got {reprlib.repr(found)}.")
    return found.prompt, found.completion


def _in_threads(
    texts: Iterator[list[str]], tokenizer: Encoder, options: Options
) -> Iterator[Block]:
    """The blocks in order; encoded beside the reading where the tokenizer lets Python go on."""
    if not hasattr(tokenizer, "encode_many"):
        yield from (encoded(some, tokenizer, options) for some in texts)
        return
    threads = min(THREADS, os.cpu_count() or 1)  # reading takes a part of one
    waiting: deque[Future[Block]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for some in texts:
            waiting.append(pool.submit(encoded, some, tokenizer, options))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def encoded(texts: list[str], tokenizer: Any, options: Options) -> Block:
    """A block of examples of a prompt and a completion each, encoded and cut."""
    many = getattr(tokenizer, "encode_many", None)
    ids, ends = many(texts) if many else _one_by_one(texts, tokenizer)
    prompts = np.diff(ends, prepend=-1)[::2] - 1
    # What ends a prompt is no part of the example; it makes room for the separator.
    between = (prompts > 0) & (options.separator is not None)
    keep = np.ones(len(ids), bool)
    keep[ends[::2]] = between
    keep[ends[1::2]] = options.eos
    if options.separator is not None:
        ids[ends[::2]] = options.separator
    prompts = prompts + between
    lengths = np.diff(ends[1::2], prepend=-1) - (~between) - (not options.eos)
    ids = ids[keep]
    if long := int((lengths > options.max_length).sum()):
        ids = ids[places(lengths) < options.max_length]
    return Block(ids, np.minimum(lengths, options.max_length), prompts.astype(np.int32), long)


def _one_by_one(texts: Sequence[str], tokenizer: Encoder) -> tuple[Array, Array]:
    """As `Tokenizer.encode_many`, by any tokenizer."""
    rows = [[*tokenizer.encode(text), tokenizer.eos] for text in texts]
    ids = np.fromiter((i for row in rows for i in row), np.int32)
    return ids, np.cumsum([len(row) for row in rows]) - 1
