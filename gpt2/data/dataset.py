"""Token ids of all examples end to end, in memory or on disk; and text made into ids.

Shapes: T time · N tokens of several examples.
"""

import hashlib
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from itertools import islice
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from gpt2.data.examples import Example
from gpt2.data.order import mixed
from gpt2.loss import IGNORE

Array = np.ndarray[Any, np.dtype[Any]]
AT_A_TIME = 1 << 16  # examples that are read together
ENCODED = 2048  # examples that are encoded together
THREADS = 8  # at most


class Dataset(Sequence[tuple[Tensor, Tensor]]):
    """Tokenised examples: item i is its token ids and its labels, `(T,)` each.

    Args:
        ids: all token ids end to end.
        ends: where each example ends in `ids`.
        ignored: how many of each example's first tokens are not learnt, or of all examples'.
        truncated: how many examples were cut to the longest length.
        known: `prompts`, how many of each example's first tokens are its prompt, if that is not
            `ignored`; and values of the cached properties.
    """

    def __init__(
        self, ids: Array, ends: Array, ignored: Array | int, truncated: int = 0, **known: Any
    ) -> None:
        self.ids, self.ends, self.ignored = ids, ends, np.broadcast_to(ignored, ends.shape)
        self.n_tokens, self.truncated, self.prompts = len(ids), truncated, self.ignored
        vars(self).update(known)

    def __repr__(self) -> str:
        size = f"{len(self):,} examples, {self.n_tokens:,} tokens, the longest {self.longest:,}"
        return f"<Dataset: {size}; {self.truncated:,} cut>"

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        ids, learnt, _ = self.take(np.array([range(len(self))[i]]))  # raises IndexError
        return torch.from_numpy(ids), torch.from_numpy(np.where(learnt, ids, IGNORE))

    def take(self, chosen: Array) -> tuple[Array, Array, Array]:
        """Several examples end to end: ids and whether each is learnt, `(N,)`; their lengths."""
        starts, lengths = self._spans(chosen)
        within = offsets(lengths)
        ids = self.ids[within + np.repeat(starts, lengths)].astype(np.int64)
        return ids, within >= np.repeat(self.ignored[chosen], lengths), lengths

    def only(self, chosen: Array) -> Self:
        """These examples, in memory; how many of them were cut is not known."""
        ids, _, lengths = self.take(chosen)
        ignored, prompts = self.ignored[chosen], self.prompts[chosen]
        ids = ids.astype(np.int32)
        return type(self)(ids, np.cumsum(lengths), ignored, prompts=prompts)

    def supervised(self, chosen: Array) -> Array:
        """How many tokens of each of these examples are learnt, the first of an example never."""
        lengths = self._spans(chosen)[1]
        return np.maximum(lengths - np.maximum(self.ignored[chosen], 1), 0)

    def prompt_keys(self) -> Iterator[Array]:
        """64 bits of each example's prompt, or of one without as a whole; many at a time."""
        for ids, ends, _, prompts in self._parts():
            lengths = np.diff(ends, prepend=0)
            upto = np.where(prompts > 0, np.minimum(prompts, lengths), lengths)
            at = offsets(lengths)
            bits = mixed(ids.astype(np.uint64) ^ (at.astype(np.uint64) << np.uint64(32)))
            bits[at >= np.repeat(upto, lengths)] = 0
            sums = np.append(np.uint64(0), np.cumsum(bits))  # modulo 2**64, as are the differences
            yield mixed((sums[ends] - sums[ends - lengths]) ^ upto.astype(np.uint64))

    @property
    def lengths(self) -> Array:
        """Tokens of each example."""
        return np.diff(self.ends, prepend=0)

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return len(self.histogram) - 1

    @cached_property
    def histogram(self) -> Array:
        """How many examples have 0, 1, 2, … tokens, up to the longest."""
        return np.bincount(self.lengths)

    @cached_property
    def extremes(self) -> tuple[int, int]:
        """The lowest token id and the highest, or 0 if that is beyond."""
        return int(self.ids.min(initial=0)), int(self.ids.max(initial=0))

    @cached_property
    def by_length(self) -> Array:
        """The numbers of all examples, the shortest first."""
        return np.argsort(self.lengths, kind="stable")

    @cached_property
    def unlearnable(self) -> str:
        """Which examples, numbered from 1, have no token to learn; empty if all have one."""
        numbers = np.flatnonzero(self.lengths <= np.maximum(self.ignored, 1)) + 1
        shown = ", ".join(map(str, numbers[:10])) + "…" * (len(numbers) > 10)
        return f"{len(numbers)} examples leave no token to learn: {shown}" if len(numbers) else ""

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the data, equal in memory and on disk."""
        digest = hashlib.sha256()
        for ids, ends, ignored, _ in self._parts():
            for numbers in (ids, ends, ignored):
                digest.update(np.ascontiguousarray(numbers, "<i8").data)
        return digest.hexdigest()

    def _spans(self, chosen: Array) -> tuple[Array, Array]:
        """Where these examples start, and their lengths."""
        chosen = np.asarray(chosen, np.int64)  # of a store's by_length, which has no sign
        starts = np.where(chosen > 0, self.ends[chosen - 1], 0)
        return starts, self.ends[chosen] - starts

    def _parts(self) -> Iterator[tuple[Array, Array, Array, Array]]:
        """Many examples at a time: ids, where each ends in these, ignored, prompts."""
        begin = 0
        for first in range(0, len(self), AT_A_TIME):
            part = slice(first, first + AT_A_TIME)
            ends = self.ends[part]
            ids = self.ids[begin : int(ends[-1])]
            yield ids, ends - begin, self.ignored[part], self.prompts[part]
            begin = int(ends[-1])


def offsets(lengths: Array) -> Array:
    """The offset of each token in its example: 0 … length-1 for each length."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) - np.repeat(starts, lengths)


def encode(
    examples: Iterable[Example | str],
    tokenizer: Any,
    *,
    max_length: int = 1024,
    eos: bool = True,
    answer_only: bool = False,
    separator: int | None = None,
) -> Dataset:
    """Tokenise examples, prompt and completion each; a string is learnt as a whole.

    Args:
        examples: any number, read once.
        tokenizer: as `gpt2.Tokenizer`: its `encode` gives a text's ids, its `eos` ends a text.
        max_length: tokens an example at most; a longer one is cut and counted in `truncated`.
        eos: end each example with the end-of-text token, and learn to write it.
        answer_only: learn the completion, not the prompt.
        separator: a token id between prompt and completion, as the prompt's last; give it to the
            model at the end of each prompt.

    Raises:
        ValueError: no examples, one string for all, or listing the examples (by number, from 1)
            that have no token to learn.
    """
    if isinstance(examples, str):
        raise ValueError("examples is one str: give a list of them.")
    ids, ends, prompts, truncated = array("i"), array("q"), array("i"), 0
    run = partial(_encoded, tokenizer, max_length, eos, separator)
    # Threads run beside the reading of the texts, where a tokenizer lets them.
    runs = _in_threads if hasattr(tokenizer, "encode_many") else map
    for part, lengths, asked in runs(run, _texts(iter(examples))):
        truncated += int((lengths > max_length).sum())
        ends.frombytes((len(ids) + np.cumsum(np.minimum(lengths, max_length))).tobytes())
        ids.frombytes(part.tobytes())
        prompts.frombytes(asked.astype(np.int32).tobytes())
    asked = np.frombuffer(prompts, np.int32)
    given = (np.frombuffer(ids, np.int32), np.frombuffer(ends, np.int64))
    data = Dataset(*given, asked if answer_only else 0, truncated, prompts=asked)
    if not len(data):
        raise ValueError("There are no examples.")
    if data.unlearnable:
        raise ValueError(f"{data.unlearnable}. Remove them, or raise max_length.")
    return data


def without_overlap(held_out: Dataset, learnt: Dataset, name: str = "validation") -> Dataset:
    """The held-out examples whose prompt no learnt example has; an error calls them `name`."""
    keys = np.concatenate([*held_out.prompt_keys()])
    learnt_too = np.any([np.isin(keys, part) for part in learnt.prompt_keys()], axis=0)
    if learnt_too.all():
        raise ValueError(f"Every {name} example has a prompt that is learnt too.")
    return held_out.only(np.flatnonzero(~learnt_too)) if learnt_too.any() else held_out


def _texts(examples: Iterator[Example | str]) -> Iterator[list[str]]:
    """The prompts and completions of many examples, in turns."""
    while part := list(islice(examples, ENCODED)):
        pairs = (("", e) if isinstance(e, str) else (e.prompt, e.completion) for e in part)
        yield [text for pair in pairs for text in pair]


def _in_threads(run: Callable[[Any], Any], parts: Iterable[Any]) -> Iterator[Any]:
    """What `run` makes of each part, in order."""
    threads = min(THREADS, os.cpu_count() or 1)  # reading takes a part of one
    waiting = deque[Future[Any]]()
    with ThreadPoolExecutor(threads) as pool:
        for part in parts:
            waiting.append(pool.submit(run, part))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _encoded(
    tokenizer: Any, longest: int, eos: bool, separator: int | None, texts: list[str]
) -> tuple[Array, Array, Array]:
    """Examples of a prompt and a completion each: ids, lengths before the cut, and prompts'."""
    if hasattr(tokenizer, "encode_many"):
        ids, ends = tokenizer.encode_many(texts)
    else:
        rows = [[*tokenizer.encode(text), tokenizer.eos] for text in texts]
        ids = np.fromiter((i for row in rows for i in row), np.int32)
        ends = np.cumsum([len(row) for row in rows]) - 1
    prompts = np.diff(ends, prepend=-1)[::2] - 1
    # What ends a prompt is no part of the example; it makes room for the separator.
    between = (prompts > 0) & (separator is not None)
    keep = np.ones(len(ids), bool)
    keep[ends[::2]], keep[ends[1::2]] = between, eos
    if separator is not None:
        ids[ends[::2]] = separator
    lengths = np.diff(ends[1::2], prepend=-1) - (~between) - (not eos)
    ids = ids[keep]
    if (lengths > longest).any():
        ids = ids[offsets(lengths) < longest]
    return ids, lengths, prompts + between
