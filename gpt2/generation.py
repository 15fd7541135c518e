"""Text from a GPT-2: read the prompts once (prefill), then feed each new token back (step).

Read `Decoder` first; `stream` and `generate` fetch what it makes. How a GPU repeats a step fast is
in `gpt2.fast.decoding`.

Shapes: B rows (prompts) · T time · C n_embd · V vocab.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from gpt2.cache import KVCache
from gpt2.config import GPT2Config
from gpt2.fast.compiling import compiled
from gpt2.fast.decoding import Repeated, burst, draws_on
from gpt2.faults import listed
from gpt2.model import GPT2
from gpt2.prompts import Prompts, check, token_rows
from gpt2.sampling import (
    GenerateConfig,
    apply_repetition_penalty,
    greedy,
    sample,
    tokens_seen,
    uniform_numbers,
)

GREEDY = GenerateConfig()
"""The defaults: greedy, 40 tokens, until the end of the text."""


def generate(
    model: GPT2,
    prompts: Prompts,
    config: GenerateConfig = GREEDY,
    *,
    compile: bool = False,
) -> list[list[int]]:
    """Continue each prompt.

    In float32 and float64 each prompt gives what it gives alone, whatever prompts lie beside it.
    In bfloat16 and float16 it need not: a product of more rows is rounded otherwise, that can
    decide between two tokens, and from there on the texts differ. The same call gives the same.

    On a GPU the step from one token to the next is replayed as a CUDA graph, and the tokens are
    fetched in bursts.

    Args:
        model: a GPT-2, with adapters or without; used in eval mode and left in its own.
        prompts: lists of token ids, of any lengths; or a tensor of ids `(B, T)`.
        config: how to choose tokens and when to stop.
        compile: run the step through torch.compile; pays from some thousand tokens on.

    Returns:
        The new tokens of each prompt, without the one that ended it.

    Raises:
        ValueError: `model` is no GPT-2, or listing the prompts that are no token ids, are empty,
            hold ids that the model does not know, or leave no room in its context.
        RuntimeError: naming the prompts for which the model gave logits that are not finite, and
            after which token. On a GPU it is noticed once a burst.
    """
    rows = _checked(model, prompts, config)
    texts: list[list[int]] = [[] for _ in rows]
    look = burst(next(model.parameters()).device)
    for tokens in _stream(model, rows, config, look, compile) if rows else ():
        for text, token in zip(texts, tokens, strict=True):
            if token is not None:
                text.append(token)
    return texts


def stream(
    model: GPT2,
    prompts: Prompts,
    config: GenerateConfig = GREEDY,
    *,
    compile: bool = False,
) -> Iterator[list[int | None]]:
    """As `generate`, token by token: each item holds one token a row, None for rows that stopped.

    Prompts are checked at once; between items the model is in its own mode, so that a stream may
    be left at any time.
    """
    rows = _checked(model, prompts, config)
    return _stream(model, rows, config, 1, compile) if rows else iter(())


class Decoder:
    """Prompts that are being continued; born with the first new token of each.

    `step` adds a token to each row, also to rows that have ended: when to stop is the caller's.
    The tensors are on the model's device, and each step writes to them where they lie, so that it
    can be replayed as a CUDA graph.

    Args:
        model: a GPT-2 in eval mode; it must stay as it is.
        rows: the prompts' ids, as `generate` checks them.
        config: how to choose tokens; no more than `max_new_tokens` fit.
        compile: run the step through torch.compile.

    Attributes:
        text: `(max_new_tokens, B)` new tokens, of which the first `n` rows are made; -1 where the
            logits were not finite.
        n: `(1,)` how many new tokens a row there are.
        tokens: `(B,)` the last of each row: what the next step reads.
        cache: the keys and values that attention has seen.
        seen: `(B, V)` booleans, true for the tokens that a row holds; None without a penalty.
        uniform: `(max_new_tokens, B)` random numbers, on the CPU if the device has no float64.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: GPT2,
        rows: Sequence[Sequence[int]],
        config: GenerateConfig = GREEDY,
        *,
        compile: bool = False,
    ) -> None:
        self.model, self.config = model, config
        self._run = compiled(step) if compile else step
        device, new = next(model.parameters()).device, config.max_new_tokens
        self._repeated = Repeated(device, new, compile)
        slots = self._repeated.slots(max(map(len, rows)) + new, model.config.block_size)
        logits, self.cache = prefill(model, rows, slots)
        self.seen = tokens_seen(rows, logits) if config.repetition_penalty != 1 else None
        self.uniform = uniform_numbers(len(rows), config).to(draws_on(device))
        self.text = torch.zeros(new, len(rows), dtype=torch.long, device=device)
        self.n = torch.zeros(1, dtype=torch.long, device=device)
        self.tokens = torch.zeros(len(rows), dtype=torch.long, device=device)
        self._left = new - 1  # counted here too: asking the device for `n` would make it wait
        self._append(logits)

    @torch.no_grad()
    def step(self) -> None:
        """Add a token to each row.

        Raises:
            RuntimeError: all `max_new_tokens` are made.
        """
        if not self._left:
            raise RuntimeError(f"All {len(self.text)} new tokens that were asked for are made.")
        self._left -= 1
        self._repeated(self._step, self._changed)

    def fetched(self, start: int, stop: int) -> list[list[int]]:
        """The new tokens `start` to `stop`, a list of B each; the host waits for the device."""
        return cast(Any, self.text[start:stop]).tolist()

    def _step(self) -> Tensor:
        if self._repeated.fixed:
            self.cache.widen()
        return self._append(self._run(self.model, self.tokens, self.cache))

    def _append(self, logits: Tensor) -> Tensor:
        """Choose a token a row from logits `(B, V)`, and write it down."""
        if self.seen is not None:
            penalty = self.config.repetition_penalty
            logits = apply_repetition_penalty(logits.float(), self.seen, penalty)
        if self.config.temperature:
            uniform = self.uniform[self.n.to(self.uniform.device)][0]  # (B,)
            chosen = sample(logits, self.config, uniform)
        else:
            chosen = greedy(logits)
        self.text[self.n] = chosen
        self.n += 1
        self.tokens.copy_(chosen.clamp(min=0))  # -1 is no id to feed back
        if self.seen is not None:
            self.seen.scatter_(1, self.tokens[:, None], True)
        return self.tokens

    def _changed(self) -> list[Tensor]:
        """The tensors that a step writes to."""
        seen = [] if self.seen is None else [self.seen]
        caches = [layer.kv for layer in self.cache.layers]
        return [self.text, self.n, self.tokens, self.cache.lengths, *caches, *seen]


def prefill(model: GPT2, rows: Sequence[Sequence[int]], slots: int) -> tuple[Tensor, KVCache]:
    """Read the prompts: logits `(B, V)` after the last token of each, and the cache they fill."""
    weight = next(model.parameters())
    lengths = torch.tensor([len(row) for row in rows], device=weight.device)
    longest = max(map(len, rows))
    padded = [[*row, *[0] * (longest - len(row))] for row in rows]
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    cache = KVCache(model.config, len(rows), slots, dtype, weight.device)
    hidden = model.transformer(torch.tensor(padded, device=weight.device), cache)  # (B, T, C)
    last = hidden[torch.arange(len(rows), device=weight.device), lengths - 1]  # (B, C)
    cache.lengths = lengths  # the padding's slots are overwritten before they are ever seen
    return model.lm_head(last), cache


def step(model: GPT2, tokens: Tensor, cache: KVCache) -> Tensor:
    """Append one token `(B,)` to each row of the cache: logits `(B, V)` of the next."""
    return model(tokens[:, None], cache=cache)[:, -1]


def _stream(
    model: GPT2, rows: list[list[int]], config: GenerateConfig, look: int, compile: bool
) -> Iterator[list[int | None]]:
    """Tokens as they come, of which the host looks at `look` a time."""
    with _evaluating(model):
        decoder = Decoder(model, rows, config, compile=compile)
    running = [True] * len(rows)
    for start in range(0, config.max_new_tokens, look):
        stop = min(start + look, config.max_new_tokens)
        with _evaluating(model):
            for _ in range(max(start, 1), stop):
                decoder.step()
        for new, ids in enumerate(decoder.fetched(start, stop), start):
            running = [runs and t != config.eos for runs, t in zip(running, ids, strict=True)]
            if not any(running):
                return
            tokens = [token if runs else None for token, runs in zip(ids, running, strict=True)]
            _refuse_not_finite(tokens, rows, new)
            yield tokens


def _refuse_not_finite(tokens: list[int | None], rows: list[list[int]], new: int) -> None:
    bad = [row for row, token in enumerate(tokens) if token == -1]
    if bad:
        where = [f"prompt {i} after its {len(rows[i])} tokens and {new} new ones" for i in bad]
        raise RuntimeError(
            f"The logits are not finite: {listed(where)}. Look for NaN or too large numbers in "
            "the weights and the adapters, or use a dtype with a wider range."
        )


def _checked(model: GPT2, prompts: Prompts, config: GenerateConfig) -> list[list[int]]:
    """The prompts' ids, if this is a model that can continue them."""
    found: Any = model  # a wrapper that hands on what it wraps, as torch.compile's does, is fine
    if not isinstance(getattr(found, "config", None), GPT2Config):
        raise ValueError(
            f"generate takes a gpt2.GPT2, got {type(found).__name__}. Is the model wrapped in "
            "another, such as DataParallel? Pass the one inside."
        )
    if next(model.parameters()).is_meta:
        raise ValueError("The model is on the meta device, where it has no weights: load some.")
    rows = token_rows(prompts)
    check(rows, model.config, config.max_new_tokens)
    return rows


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    """Eval mode inside; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
