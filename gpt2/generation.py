"""Text from a GPT-2: the loop that feeds each new token back, with a key-value cache.

Shapes: B rows (prompts) · T time · C n_embd · V vocab.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from gpt2.cache import KVCache
from gpt2.fast.compiling import bucket, compiled
from gpt2.fast.graphs import GraphedCalls
from gpt2.model import GPT2
from gpt2.sampling import GenerateConfig, apply_repetition_penalty, sample

GREEDY = GenerateConfig()
"""The defaults: greedy, 40 tokens, until the end of the text."""
BURST = 16
"""Tokens a row that a GPU makes before the host looks whether all rows have ended."""
GRAPHED = 24
"""New tokens from which capturing a CUDA graph of the step costs less than it saves."""


def generate(
    model: GPT2,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig = GREEDY,
    *,
    compile: bool = False,
) -> list[list[int]]:
    """Continue each prompt.

    On a GPU the step from one token to the next is replayed as a CUDA graph, and the tokens are
    fetched in bursts.

    Args:
        model: a GPT-2, with adapters or without; used in eval mode and left in its own.
        prompts: token ids; of any lengths, each gives what it gives alone.
        config: how to choose tokens and when to stop.
        compile: run the step through torch.compile; pays from some thousand tokens on.

    Returns:
        The new tokens of each prompt, without the one that ended it.

    Raises:
        ValueError: listing the prompts that are empty, hold ids that the model does not know, or
            leave no room in its context.
    """
    _check(model, prompts, config.max_new_tokens)
    texts: list[list[int]] = [[] for _ in prompts]
    burst = BURST if next(model.parameters()).is_cuda else 1
    for tokens in _stream(model, prompts, config, burst, compile) if prompts else ():
        for text, token in zip(texts, tokens, strict=True):
            if token is not None:
                text.append(token)
    return texts


def stream(
    model: GPT2,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig = GREEDY,
    *,
    compile: bool = False,
) -> Iterator[list[int | None]]:
    """As `generate`, token by token: each item holds one token a row, None for rows that stopped.

    Prompts are checked at once; between items the model is in its own mode, so that a stream may
    be left at any time.
    """
    _check(model, prompts, config.max_new_tokens)
    return _stream(model, prompts, config, 1, compile) if prompts else iter(())


def _stream(
    model: GPT2,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig,
    burst: int,
    compile: bool,
) -> Iterator[list[int | None]]:
    with torch.no_grad(), _evaluating(model):
        decoding = _Decoding(model, prompts, config, compile)
    running = [True] * len(prompts)
    for start in range(0, config.max_new_tokens, burst):
        stop = min(start + burst, config.max_new_tokens)
        with torch.no_grad(), _evaluating(model):
            for _ in range(max(start, 1), stop):
                decoding.step()
        # Here, once a burst, the host waits for the device.
        for ids in cast(list[list[int]], cast(Any, decoding.text[start:stop]).tolist()):
            running = [runs and t != config.eos for runs, t in zip(running, ids, strict=True)]
            if not any(running):
                return
            yield [token if runs else None for token, runs in zip(ids, running, strict=True)]


class _Decoding:
    """Prompts that are being continued, all on the device; born with their first new token.

    `step` adds a token to each row of `text` `(tokens, B)`. What it reads and writes keeps its
    place in memory, so that it can be replayed as a CUDA graph.
    """

    def __init__(
        self,
        model: GPT2,
        prompts: Sequence[Sequence[int]],
        config: GenerateConfig,
        compile: bool,
    ) -> None:
        self.model, self.config = model, config
        self.run = compiled(step) if compile else step
        longest = max(map(len, prompts)) + config.max_new_tokens
        slots = bucket(longest, model.config.block_size) if compile else longest
        logits, self.cache = prefill(model, prompts, slots)
        device = logits.device
        self.uniform = _random_numbers(len(prompts), config).to(device)  # (tokens, B)
        self.seen = _seen(prompts, logits) if config.repetition_penalty != 1 else None
        self.text = torch.zeros(self.uniform.shape, dtype=torch.long, device=device)
        self.n = torch.zeros(1, dtype=torch.long, device=device)  # how many tokens there are
        self.tokens = torch.zeros(len(prompts), dtype=torch.long, device=device)  # the last
        graphed = device.type == "cuda" and config.max_new_tokens >= GRAPHED
        self.fixed = compile or graphed
        self._add(logits)
        self.graphs = GraphedCalls() if graphed else None

    def step(self) -> None:
        """Add a token to each row."""
        if self.graphs is None:
            self._step()
        else:
            self.graphs(self._step, self._state)

    def _step(self) -> Tensor:
        if self.fixed:  # the same shapes each time: the mask hides the slots not yet filled
            self.cache.filled = self.cache.slots - 1
        return self._add(self.run(self.model, self.tokens, self.cache))

    def _add(self, logits: Tensor) -> Tensor:
        """Append the tokens chosen from logits `(B, V)`."""
        uniform = self.uniform[self.n][0] if self.config.temperature else self.uniform[0]
        self.tokens.copy_(_choose(logits, self.seen, self.config, uniform))
        if self.seen is not None:
            self.seen.scatter_(1, self.tokens[:, None], True)
        self.text[self.n] = self.tokens
        self.n += 1
        return self.tokens

    def _state(self) -> list[Tensor]:
        seen = [] if self.seen is None else [self.seen]
        caches = [layer.kv for layer in self.cache.layers]
        return [self.text, self.n, self.tokens, self.cache.lengths, *caches, *seen]


def _choose(logits: Tensor, seen: Tensor | None, config: GenerateConfig, uniform: Tensor) -> Tensor:
    """The next token `(B,)` from logits `(B, V)`."""
    if seen is not None:
        logits = apply_repetition_penalty(logits.float(), seen, config.repetition_penalty)
    return sample(logits, config, uniform)


def prefill(model: GPT2, prompts: Sequence[Sequence[int]], slots: int) -> tuple[Tensor, KVCache]:
    """Read the prompts: logits `(B, V)` after the last token of each, and the cache they fill."""
    weight = next(model.parameters())
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=weight.device)
    longest = max(map(len, prompts))
    padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    cache = KVCache(model.config, len(prompts), slots, dtype, weight.device)
    hidden = model.transformer(torch.tensor(padded, device=weight.device), cache)  # (B, T, C)
    last = hidden[torch.arange(len(prompts), device=weight.device), lengths - 1]  # (B, C)
    cache.lengths = lengths  # the padding's slots are overwritten before they are ever seen
    return model.lm_head(last), cache


def step(model: GPT2, tokens: Tensor, cache: KVCache) -> Tensor:
    """Append one token `(B,)` to each row of the cache: logits `(B, V)` of the next."""
    return model(tokens[:, None], cache=cache)[:, -1]


def _check(model: GPT2, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """The errors that `generate` promises."""
    limit, vocab_size = model.config.block_size, model.config.vocab_size
    faults: list[str] = []
    for i, prompt in enumerate(prompts):
        if not prompt:
            faults.append(f"prompt {i} is empty (start with the end-of-text id instead)")
        elif not 0 <= min(prompt) <= max(prompt) < vocab_size:
            faults.append(f"prompt {i} holds ids outside 0..{vocab_size - 1}")
        elif len(prompt) + max_new_tokens > limit:
            faults.append(
                f"prompt {i} has {len(prompt)} tokens, and with {max_new_tokens} new ones passes "
                f"the context of {limit}"
            )
    if faults:
        raise ValueError(f"Nothing was generated: {'; '.join(faults)}.")


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


def _random_numbers(rows: int, config: GenerateConfig) -> Tensor:
    """Uniform numbers `(tokens, B)` from each row's own generator, the same for every device."""
    generators = [torch.Generator().manual_seed(config.seed + row) for row in range(rows)]
    return torch.stack(
        [torch.rand(config.max_new_tokens, dtype=torch.double, generator=g) for g in generators], 1
    )


def _seen(prompts: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
    """Which tokens each prompt holds, `(B, V)` booleans like `logits`."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[torch.tensor(prompt, device=logits.device)] = True
    return seen
