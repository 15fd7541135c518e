"""Examples to token ids, which lie end to end in one array: four bytes a token.

Shapes: T time.
"""

from __future__ import annotations

import reprlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gpt2.data.examples import SHOWN, Example
from gpt2.training.loss import IGNORE


class Encoder(Protocol):
    """What turns text into token ids; `gpt2.Tokenizer` is one."""

    @property
    def eos(self) -> int:
        """The id that ends a text."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of an ordinary text."""
        ...


class Dataset(Sequence[tuple[Tensor, Tensor]]):
    """Tokenised examples: item i is its token ids and its labels, `(T,)` each.

    Args:
        tokens: all ids end to end.
        ends: where each example ends in `tokens`.
        ignored: how many of each example's first tokens are not learnt.
        truncated: how many examples were cut to the longest length.
    """

    def __init__(
        self, tokens: array[int], ends: array[int], ignored: array[int], truncated: int = 0
    ) -> None:
        self._tokens = np.frombuffer(tokens, np.int32)
        self._ends = np.frombuffer(ends, np.int64)
        self._starts = np.concatenate([[0], self._ends[:-1]])
        self._ignored = np.frombuffer(ignored, np.int32)
        self.truncated = truncated

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        held = self._tokens[self._starts[i] : self._ends[i]]
        ids = torch.tensor(held, dtype=torch.long, device="cpu")
        labels = ids.clone()
        labels[: int(self._ignored[i])] = IGNORE
        return ids, labels

    @property
    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens of each example."""
        return self._ends - self._starts

    @property
    def n_tokens(self) -> int:
        """Tokens of all examples."""
        return len(self._tokens)


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
    _check(examples, tokenizer, max_length, (eos, answer_only), separator)
    between = [] if separator is None else [separator]
    tokens, ends, ignored = array("i"), array("q"), array("i")
    truncated, untaught = 0, list[int]()
    for number, example in enumerate(examples, 1):
        example = _example(example, number)
        prompt = tokenizer.encode(example.prompt) + between * bool(example.prompt)
        ids = prompt + tokenizer.encode(example.completion) + [tokenizer.eos] * eos
        truncated += len(ids) > max_length
        ids = ids[:max_length]
        skipped = len(prompt) if answer_only else 0
        if len(ids) <= max(skipped, 1):  # the first token is never predicted
            untaught.append(number)
        tokens.extend(ids)
        ends.append(len(tokens))
        ignored.append(skipped)
    if untaught:
        listed = ", ".join(map(str, untaught[:SHOWN])) + ("…" if len(untaught) > SHOWN else "")
        raise ValueError(
            f"{len(untaught)} examples leave no token to learn within {max_length}: {listed}. "
            "Remove them, or raise max_length."
        )
    if not ends:
        raise ValueError("There are no examples.")
    return Dataset(tokens, ends, ignored, truncated)


def _check(
    examples: object,
    tokenizer: object,
    max_length: int,
    options: tuple[bool, bool],
    separator: int | None,
) -> None:
    """The errors that `encode` promises before it reads."""
    if type(max_length) is not int or max_length < 2:
        raise ValueError(f"max_length must be at least 2, and whole, got {max_length!r}.")
    if separator is not None and (type(separator) is not int or separator < 0):
        raise ValueError(f"separator must be a token id, or None, got {separator!r}.")
    if isinstance(examples, str | Example):
        kind = "string" if type(examples) is str else "Example"
        raise ValueError(f"examples is one {kind}, {str(examples)[:20]!r}…: give a list of them.")
    if not isinstance(examples, Iterable):
        raise ValueError(f"examples must be several, got {type(examples).__name__}.")
    if not hasattr(tokenizer, "encode") or not all(type(option) is bool for option in options):
        raise ValueError(
            "Give a tokenizer such as gpt2.Tokenizer(), and True or False for options."
        )


def _example(found: object, number: int) -> Example:
    if isinstance(found, str):
        return Example("", found)
    if not isinstance(found, Example):
        raise ValueError(
            f"Example {number} is a {type(found).__name__}: give a string, which is learnt as a "
            "whole, or gpt2.Example(prompt, completion)."
        )
    if {type(found.prompt), type(found.completion)} != {str}:
        raise ValueError(f"Example {number} must hold two strings, got {reprlib.repr(found)}.")
    return found
