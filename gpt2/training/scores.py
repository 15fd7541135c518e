"""Scores of generated text."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from gpt2.data.dataset import Dataset
from gpt2.files import is_sharded
from gpt2.generation import generate
from gpt2.model import GPT2
from gpt2.sampling import GenerateConfig
from gpt2.tokenizer import Tokenizer
from gpt2.training import distributed
from gpt2.training.losses import inner

Texts = Sequence[str]
Score = Callable[[Texts, Sequence[Texts]], float]
DRAWS = 1000  # of an interval
ROWS = {"cpu": 64, "mps": 64}  # prompts that are continued together; elsewhere 512


def exact_match(texts: Texts, references: Sequence[Texts]) -> float:
    """The share of texts, in [0, 1], that equal a reference, but for outer blanks."""
    pairs = zip(texts, references, strict=True)
    return float(np.mean([text.strip() in {r.strip() for r in of} for text, of in pairs]))


def interval(score: Score, texts: Texts, references: Sequence[Texts]) -> tuple[float, float]:
    """The score's 95 % interval over draws of the prompts; its own `interval`, if it has one.

    Source: Efron's percentile bootstrap, 1,000 draws, seed 0.
    """
    if hasattr(score, "interval"):
        return getattr(score, "interval")(texts, references)  # noqa: B009 - no Score need have it
    draws: list[list[int]] = (
        np.random.default_rng(0).integers(len(texts), size=(DRAWS, len(texts))).tolist()
    )
    values = [score([texts[i] for i in d], [references[i] for i in d]) for d in draws]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


class Scorer:
    """Prompts of examples, which a model continues; all completions of one are its references.

    Args:
        data: the examples.
        score: from texts and references to a number.
        prompts: how many, the first; None for all.

    Raises:
        ValueError: no example has a prompt and a completion.
    """

    def __init__(self, data: Dataset, score: Score, prompts: int | None = None) -> None:
        self.score = score
        tokenizer = Tokenizer()

        keys = np.concatenate([*data.prompt_keys()])
        asked = np.asarray(data.prompts) > 0
        _, first = np.unique(keys[asked], return_index=True)
        chosen = keys[asked][np.sort(first)[:prompts]]
        references: dict[tuple[int, ...], list[str]] = {}
        self.longest = 1
        for i in np.flatnonzero(np.isin(keys, chosen) & asked):
            ids, n = data[int(i)][0].tolist(), int(data.prompts[i])
            self.longest = max(self.longest, len(ids) - n)
            completion = tokenizer.decode([token for token in ids[n:] if token != tokenizer.eos])
            references.setdefault(tuple(ids[:n]), []).append(completion)

        if not references:
            raise ValueError(
                "A score needs examples with a prompt and a completion: none has both."
            )
        self.prompts, self.references = [*references], [*references.values()]

    def texts(self, model: nn.Module) -> list[str]:
        """Greedy texts, at most as long as the longest reference.

        Several processes share the prompts, and each has all texts.

        Raises:
            ValueError: the model is no GPT-2.
        """
        network = inner(model)
        tokenizer = Tokenizer()
        if not isinstance(network, GPT2):
            raise ValueError(f"A score takes a GPT-2, got {type(model).__name__}.")

        rank = distributed.rank()
        size = distributed.size()
        if any(map(is_sharded, network.parameters())):  # all run at once
            rank, size = 0, 1
        mine = {i: self._new(network, p) for i, p in enumerate(self.prompts) if i % size == rank}

        rows = ROWS.get(next(network.parameters()).device.type, 512)
        texts: dict[int, str] = {}
        for new in sorted({*mine.values()}):
            same = [i for i, n in mine.items() if n == new]
            for part in (same[at : at + rows] for at in range(0, len(same), rows)):
                config = GenerateConfig(max_new_tokens=new)
                with torch.no_grad():
                    made = generate(network, [self.prompts[i] for i in part], config)
                texts |= zip(part, map(tokenizer.decode, made), strict=True)

        shared: list[dict[int, str]] = distributed.gathered(texts)
        every = {i: text for of in shared for i, text in of.items()}
        return [every[i] for i in range(len(self.prompts))]

    def __call__(self, model: nn.Module) -> float:
        """The score of its texts."""
        return float(self.score(self.texts(model), self.references))

    def _new(self, network: GPT2, prompt: Sequence[Any]) -> int:
        return max(1, min(self.longest, network.config.block_size - len(prompt)))
