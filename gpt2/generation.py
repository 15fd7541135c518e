"""Text from a GPT-2: read the prompts once, then feed each new token back.

Shapes: B rows (prompts) · V vocab.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gpt2.beams import Beams
from gpt2.fast.decoding import Steps
from gpt2.files import listed
from gpt2.model import GPT2, in_mode
from gpt2.sampling import (
    GenerateConfig,
    apply_repetition_penalty,
    greedy,
    sample,
    uniform_numbers,
)

GREEDY = GenerateConfig()  # 40 tokens, until the end of the text
Prompts = Tensor | Sequence[Sequence[int]] | Sequence[Tensor]


def generate(
    model: GPT2, prompts: Prompts, config: GenerateConfig = GREEDY, *, compile: bool = False
) -> list[list[int]]:
    """Continue each prompt.

    In float32 and float64 each prompt gives what it gives alone. In bfloat16 and float16 a product
    of more rows is rounded otherwise, which can change a token and the text after it.

    Args:
        model: a GPT-2, with adapters or without; used in eval mode, and left as it was.
        prompts: lists of token ids, of any lengths; or a tensor of ids `(B, T)`.
        config: how to choose tokens and when to stop.
        compile: run the step through torch.compile; pays from thousands of tokens on.

    Returns:
        The new tokens of each prompt, without the one that ended it.

    Raises:
        ValueError: listing the prompts that are empty, hold unknown ids, or leave no room in the
            context.
        RuntimeError: naming the prompts whose logits are not finite, and after which token.
    """
    rows = _checked(model, prompts, config)
    if config.num_beams > 1:
        return _searched(model, rows, config, compile) if rows else []
    texts: list[list[int]] = [[] for _ in rows]
    for tokens in _stream(model, rows, config, compile) if rows else ():
        for text, token in zip(texts, tokens, strict=True):
            if token is not None:
                text.append(token)
    return texts


def stream(
    model: GPT2, prompts: Prompts, config: GenerateConfig = GREEDY, *, compile: bool = False
) -> Iterator[list[int | None]]:
    """As `generate`, token by token: each item holds one token a row, None for rows that stopped.

    Prompts are checked at once. Between items the model is in its former mode.

    Raises:
        ValueError: as `generate`; and beams, whose text is known when the search has ended.
    """
    if config.num_beams > 1:
        raise ValueError(f"num_beams {config.num_beams} gives no tokens one by one: use generate.")
    rows = _checked(model, prompts, config)
    return _stream(model, rows, config, compile, look=1) if rows else iter(())


class Decoder(Steps):
    """Prompts, continued; a step adds a token to each, also to those that ended."""

    def _begin(self, rows: Sequence[Sequence[int]], logits: Tensor) -> None:
        B, new, how = len(rows), self.config.max_new_tokens, self.integers
        self.seen: Tensor | None = None  # which tokens each row holds, (B, V)
        if self.config.repetition_penalty != 1:
            self.seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, ids in zip(self.seen, rows, strict=True):
                row[torch.tensor(ids, device=self.device)] = True
        # Random numbers, (new, B, 2).
        self.uniform = uniform_numbers(B, self.config).to(self.draws_on)
        # New tokens, n of them made; -1 where logits were not finite. Each row's last.
        self.text = torch.zeros(new, B, **how)
        self.n = torch.zeros(1, **how)
        self.tokens = torch.zeros(B, **how)
        self._extend(logits)

    def _extend(self, logits: Tensor) -> Tensor:
        """Choose a token a row from logits `(B, V)`."""
        if self.seen is not None:
            penalty = self.config.repetition_penalty
            logits = apply_repetition_penalty(logits.float(), self.seen, penalty)
        if self.config.temperature:
            uniform = self.uniform[self.n.to(self.uniform.device)][0]  # (B, 2)
            chosen = sample(logits, self.config, uniform)
        else:
            chosen = greedy(logits)

        self.text[self.n] = chosen
        self.n += 1
        torch.clamp(chosen, min=0, out=self.tokens)  # -1 is no id to feed back
        if self.seen is not None:
            self.seen.scatter_(1, self.tokens[:, None], True)
        return self.tokens


def _stream(
    model: GPT2, rows: list[list[int]], config: GenerateConfig, compile: bool, look: int = 0
) -> Iterator[list[int | None]]:
    """Tokens as they come, of which the host looks at `look` a time, or at a burst."""
    with in_mode(model, training=False):
        decoder = Decoder(model, rows, config, compile=compile)
    running = [True] * len(rows)
    ends = set(config.ends)
    look = look or decoder.burst
    for start in range(0, config.max_new_tokens, look):
        stop = min(start + look, config.max_new_tokens)
        with in_mode(model, training=False):
            for _ in range(max(start, 1), stop):
                decoder.step()
        for new, ids in enumerate(decoder.text[start:stop].tolist(), start):
            running = [runs and t not in ends for runs, t in zip(running, ids, strict=True)]
            if not any(running):
                return
            tokens = [token if runs else None for token, runs in zip(ids, running, strict=True)]
            _check_finite({i: new for i, token in enumerate(tokens) if token == -1}, rows)
            yield tokens


def _searched(
    model: GPT2, rows: list[list[int]], config: GenerateConfig, compile: bool
) -> list[list[int]]:
    """The best text of each row, by beam search; the host looks once a burst."""
    with in_mode(model, training=False):
        beams = Beams(model, rows, config, compile=compile)
        for new in range(1, config.max_new_tokens):
            if new % beams.burst == 0 and not beams.are_open():
                break
            beams.step()
    _check_finite({i: new for i, new in enumerate(beams.failed.tolist()) if new >= 0}, rows)
    return beams.best()


def _check_finite(failed: Mapping[int, int], rows: list[list[int]]) -> None:
    """Given the rows that failed, and after how many new tokens."""
    after = "prompt {} after its {} tokens and {} new ones".format
    if where := [after(i, len(rows[i]), new) for i, new in failed.items()]:
        raise RuntimeError(
            f"The logits are not finite: {listed(where)}. Look for NaN or large numbers in "
            "weights and adapters, or use a dtype with a wider range."
        )


def _checked(model: GPT2, prompts: Prompts, config: GenerateConfig) -> list[list[int]]:
    """The prompts' ids, if the model can continue them."""
    limit, vocab, new = model.config.block_size, model.config.vocab_size, config.max_new_tokens
    given: Any = prompts.tolist() if isinstance(prompts, Tensor) else prompts
    rows = [[operator.index(token) for token in prompt] for prompt in given]
    faults: list[str] = []
    for i, row in enumerate(rows):
        if not row:
            faults.append(f"prompt {i} is empty (start with the end-of-text id instead)")
        elif not 0 <= min(row) <= max(row) < vocab:
            faults.append(f"prompt {i} holds ids outside 0..{vocab - 1}")
        elif len(row) + new > limit:
            passes = f"with {new} new ones passes the context of {limit}"
            faults.append(f"prompt {i} has {len(row)} tokens, and {passes}")
    if faults:
        raise ValueError(f"Nothing was generated: {listed(faults)}.")
    return rows
