"""What base and tuned model answer, beside what was trained and what is the reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import gpt2


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the base and the tuned model say to one prompt.

    Args:
        prompt: the prompt.
        base, tuned: how the two continue it.
        stopped: whether the tuned model ended its answer by itself.
        trained: the continuations of this prompt that it was trained on.
        reference: the one that the file of prompts gives; "" for none.
    """

    prompt: str
    base: str
    tuned: str
    stopped: bool
    trained: tuple[str, ...]
    reference: str = ""

    @property
    def verdict(self) -> str:
        """How the tuned answer compares with what was trained, or else with the reference."""
        wanted = self.trained or ((self.reference,) if self.reference else ())
        if not wanted:
            return "not trained"
        if self.tuned in wanted:
            said = "exact" if self.stopped else "exact, cut off"
        else:
            goes_on = any(self.tuned.startswith(answer) for answer in wanted)
            said = "exact, then goes on" if goes_on else "differs"
        return said if self.trained else f"not trained; reference: {said}"


def compare(
    prompts: Sequence[gpt2.Example],
    base: Sequence[str],
    tuned: Sequence[str],
    stopped: Sequence[bool],
    examples: Iterable[gpt2.Example],
) -> list[Answer]:
    """The answers beside what the examples that begin with the same prompt go on with."""
    texts = [example.prompt + example.completion for example in examples]
    return [
        Answer(
            prompt=example.prompt,
            base=before,
            tuned=after,
            stopped=ended,
            trained=tuple(t[len(example.prompt) :] for t in texts if t.startswith(example.prompt)),
            reference=example.completion,
        )
        for example, before, after, ended in zip(prompts, base, tuned, stopped, strict=True)
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
    said = f"{trained.count('exact')} of {len(trained)} trained prompts answered word for word."
    if others := [a.verdict for a in answers if a.reference and not a.trained]:
        exact = sum(verdict.endswith(": exact") for verdict in others)
        said += f" {exact} of {len(others)} others answered as their reference."
    return said
