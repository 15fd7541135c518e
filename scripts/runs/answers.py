"""What base and tuned model answer, beside what was trained and what is the reference."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeVar

import gpt2

from .inputs import Asked

T = TypeVar("T")
SHOWN = 12  # answers that are shown of many


def sample(answers: Sequence[T]) -> Sequence[T]:
    """All of a few answers, and of many some from everywhere."""
    return answers[:: -(-len(answers) // SHOWN)] if answers else answers


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the base and the tuned model say to one prompt.

    Args:
        prompt: the prompt.
        base, tuned: how the two continue it.
        stopped: whether the tuned model ended its answer by itself.
        trained: the continuations of this prompt that it was trained on.
        references: those that the file of prompts gives.
        searched: whether all that was trained was looked through.
    """

    prompt: str
    base: str
    tuned: str
    stopped: bool
    trained: tuple[str, ...]
    references: tuple[str, ...] = ()
    searched: bool = True

    @property
    def verdict(self) -> str:
        """How the tuned answer compares with what was trained, or else with the reference."""
        wanted = self.trained or self.references
        unknown = "not trained" if self.searched else "not compared"
        if not wanted:
            return unknown
        if self.tuned in wanted:
            said = "exact" if self.stopped else "exact, cut off"
        else:
            goes_on = any(self.tuned.startswith(answer) for answer in wanted)
            said = "exact, then goes on" if goes_on else "differs"
        if self.trained:
            return said
        return f"not trained; reference: {said}" if self.searched else f"reference: {said}"


def compare(
    prompts: Sequence[Asked],
    base: Sequence[str],
    tuned: Sequence[str],
    stopped: Sequence[bool],
    examples: Iterable[gpt2.Example],
    *,
    searched: bool = True,
) -> list[Answer]:
    """The answers beside what the examples that begin with the same prompt go on with."""
    texts = [example.prompt + example.completion for example in examples]
    order = sorted(range(len(texts)), key=texts.__getitem__)
    found, n = [texts[i] for i in order], len(order)

    def trained(prompt: str) -> tuple[str, ...]:
        at = bisect_left(found, prompt)  # those that begin so stand together
        own = takewhile(lambda i: texts[i].startswith(prompt), (order[k] for k in range(at, n)))
        return tuple(texts[i][len(prompt) :] for i in sorted(own))

    return [
        Answer(
            prompt=asked.prompt,
            base=before,
            tuned=after,
            stopped=ended,
            trained=trained(asked.prompt),
            references=asked.references,
            searched=searched,
        )
        for asked, before, after, ended in zip(prompts, base, tuned, stopped, strict=True)
    ]


def decoded(
    tokenizer: gpt2.Tokenizer,
    base: Sequence[Sequence[int]],
    tuned: Sequence[Sequence[int]],
    sampling: gpt2.GenerateConfig,
) -> tuple[list[str], list[str], list[bool]]:
    """The answers of base and tuned model as text, and whether the tuned one ended each itself."""
    before, after = ([tokenizer.decode(row) for row in rows] for rows in (base, tuned))
    return before, after, [len(row) < sampling.max_new_tokens for row in tuned]


def score(answers: Sequence[Answer]) -> str:
    """How many of the trained prompts were answered word for word, and of the other references."""
    trained = [a.verdict for a in answers if a.trained]
    others = [a.verdict for a in answers if a.references and not a.trained]
    said: list[str] = []
    if trained or not others:
        exact = trained.count("exact")
        said.append(f"{exact:,} of {len(trained):,} trained prompts answered word for word.")
    if others:
        exact, which = (
            sum(v.endswith(": exact") for v in others),
            "others" if trained else "prompts",
        )
        said.append(f"{exact:,} of {len(others):,} {which} answered as a reference.")
    return " ".join(said)
