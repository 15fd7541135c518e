"""The decoder: read the prompts once (prefill), then feed each new token back (step).

`gpt2.generation` fetches what it makes. How a GPU repeats a step fast is in `gpt2.fast.decoding`.

Shapes: B rows (prompts) · T time · C n_embd · V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from gpt2.cache import KVCache
from gpt2.fast.compiling import compiled
from gpt2.fast.decoding import Repeated
from gpt2.fast.devices import draws_on
from gpt2.model import GPT2
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
        uniform: `(max_new_tokens, B, 2)` random numbers, on the CPU if the device has no float64.
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
