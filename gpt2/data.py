"""Examples to token batches: read, tokenise, truncate, shuffle, pad.

An example is a prompt and a completion; a plain text is a completion alone. The token ids of all
examples lie end to end in one int32 array, so that millions of them cost four bytes a token.

Shapes: B batch · T time.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2.loss import IGNORE

_SHOWN = 10  # faults of a file that are listed one by one


@dataclass(frozen=True)
class Example:
    """A text in two parts, of which the prompt need not be learnt."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Batch:
    """Token ids and labels, right-padded: `(B, T)` int64 each, `IGNORE` where nothing is learnt."""

    idx: Tensor
    labels: Tensor
    n_tokens: int  # tokens that are predicted and counted in the loss

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        idx, labels = (t.to(device, non_blocking=True) for t in (self.idx, self.labels))
        return Batch(idx, labels, self.n_tokens)

    def padded(self, rows: int, width: int) -> Batch:
        """The same batch with rows and columns after its own in which nothing is learnt.

        Raises:
            ValueError: it is larger than `(rows, width)`.
        """
        B, T = self.idx.shape
        if rows < B or width < T:
            raise ValueError(f"A ({B}, {T}) batch does not fit into ({rows}, {width}).")
        more = (0, width - T, 0, rows - B)
        return Batch(F.pad(self.idx, more), F.pad(self.labels, more, value=IGNORE), self.n_tokens)


class Encoder(Protocol):
    """What turns text into token ids; `gpt2.Tokenizer` is one."""

    @property
    def eos(self) -> int:
        """The id that ends a text."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of an ordinary text."""
        ...


def from_texts(texts: Iterable[str]) -> Iterator[Example]:
    """Examples that are learnt as a whole."""
    return (Example("", text) for text in texts)


def read_jsonl(path: str | Path) -> list[Example]:
    """Read examples from a file with a JSON object a line.

    A line has `text`; or `question` and `answer`, which become "Q: …\\nA: …"; or `prompt` and
    `completion`, taken as they are. Blank lines are skipped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: listing the faulty lines as `file:line`, or there is none at all.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing or no file.")
    examples: list[Example] = []
    faults: list[str] = []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                examples.append(_parse(line))
            except ValueError as error:
                faults.append(f"{path}:{number}: {error}")
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ValueError("; ".join(faults[:_SHOWN]) + more + ".")
    if not examples:
        raise ValueError(f"{path} holds no examples.")
    return examples


def _parse(line: bytes) -> Example:
    try:
        fields: Any = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("not JSON that can be read (nested too deep)") from None
    forms = ({"text"}, {"question", "answer"}, {"prompt", "completion"})
    if not isinstance(fields, dict) or (keys := cast(dict[str, Any], fields).keys()) not in forms:
        found = sorted(cast(dict[str, Any], fields)) if isinstance(fields, dict) else fields
        raise ValueError(
            f"wants 'text', or 'question' and 'answer', or 'prompt' and 'completion', got {found!r}"
        )
    fields = cast(dict[str, Any], fields)
    if wrong := [key for key in keys if not isinstance(fields[key], str)]:
        raise ValueError(f"{wrong[0]!r} is {fields[wrong[0]]!r}, not a string")
    if empty := [key for key in keys if not fields[key].strip() and key != "prompt"]:
        raise ValueError(f"{empty[0]!r} is empty")
    for key in keys:
        fields[key].encode()  # refuses half a surrogate pair, which JSON can escape
    if "text" in fields:
        return Example("", fields["text"])
    if "question" in fields:
        return Example(f"Q: {fields['question']}\nA:", f" {fields['answer']}")
    return Example(fields["prompt"], fields["completion"])


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
        ids = torch.tensor(self._tokens[self._starts[i] : self._ends[i]], dtype=torch.long)
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
) -> Dataset:
    """Tokenise examples; a string is learnt as a whole.

    Prompt and completion are tokenised apart, as they are when a model continues the prompt.

    Args:
        examples: any number, read once.
        tokenizer: as `gpt2.Tokenizer`.
        max_length: tokens an example at most; a longer one is cut and counted in `truncated`.
        eos: end each example with the end-of-text token, and learn to write it.
        answer_only: learn the completion, not the prompt.

    Raises:
        ValueError: no examples, one string for all, `max_length` below 2, or listing the examples
            (by number, from 1) that are left without a token to learn.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}.")
    if isinstance(examples, str):
        raise ValueError(f"examples is one string, {examples[:20]!r}…: give a list of them.")
    tokens, ends, ignored = array("i"), array("q"), array("i")
    truncated, untaught = 0, list[int]()
    for number, example in enumerate(examples, 1):
        if isinstance(example, str):
            example = Example("", example)
        prompt = tokenizer.encode(example.prompt)
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
        listed = ", ".join(map(str, untaught[:_SHOWN])) + ("…" if len(untaught) > _SHOWN else "")
        raise ValueError(
            f"{len(untaught)} examples leave no token to learn within {max_length}: {listed}. "
            "Remove them, or raise max_length."
        )
    if not ends:
        raise ValueError("There are no examples.")
    return Dataset(tokens, ends, ignored, truncated)


def batches(data: Dataset, batch_size: int, *, seed: int, epoch: int) -> Iterator[Batch]:
    """One epoch of shuffled batches; the same seed and epoch give the same batches.

    Args:
        data: the examples.
        batch_size: examples a batch, B; the last batch may have fewer.
        seed, epoch: fix the order.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    order = np.random.default_rng((seed, epoch)).permutation(len(data))
    for start in range(0, len(data), batch_size):
        yield collate([data[int(i)] for i in order[start : start + batch_size]])


def collate(rows: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    """Right-pad examples to one length; what is padding is told by position, never by id."""
    idx = torch.zeros(len(rows), max(len(ids) for ids, _ in rows), dtype=torch.long)
    labels = torch.full_like(idx, IGNORE)
    for i, (ids, wanted) in enumerate(rows):
        idx[i, : len(ids)] = ids
        labels[i, : len(ids)] = wanted
    return Batch(idx, labels, int((labels[:, 1:] != IGNORE).sum()))
