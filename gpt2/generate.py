"""Text from a GPT-2: a few pure functions from logits to the next token, and the loop around them.

Shapes: B rows (prompts) · T time · C n_embd · V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from gpt2.model import GPT2, KVCache


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How to choose tokens and when to stop.

    Args:
        max_new_tokens: tokens per prompt at most.
        temperature: divides the logits; 0 is greedy, the most likely token each time.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the most likely tokens that together reach this probability.
        repetition_penalty: above 1 makes tokens that a row already holds less likely.
        seed: of the random numbers; row b of a batch draws as its prompt alone with seed + b.
        eos: the token id that ends a row; None for no such id.

    Raises:
        ValueError: naming each field that is out of range.
    """

    max_new_tokens: int = 40
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    eos: int | None = 50256

    def __post_init__(self) -> None:
        least = {"max_new_tokens": 1, "top_k": 1, "seed": 0, "eos": 0}
        optional = ("top_k", "eos")
        faults = [
            f"{name} must be an integer of at least {low}, got {value!r}"
            for name, low in least.items()
            if (value := getattr(self, name)) is not None or name not in optional
            if type(value) is not int or value < low
        ]
        if not 0 <= self.temperature < math.inf:
            faults.append(f"temperature must be 0 (greedy) or above, got {self.temperature!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            faults.append(f"top_p must be in (0, 1], got {self.top_p!r}")
        if not 0 < self.repetition_penalty < math.inf:
            faults.append(f"repetition_penalty must be above 0, got {self.repetition_penalty!r}")
        if faults:
            raise ValueError("GenerateConfig: " + "; ".join(faults) + ".")


GREEDY = GenerateConfig()
"""The defaults: greedy, 40 tokens, until the end of the text."""


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide the positive logits of seen tokens by `penalty`, and multiply the negative ones.

    Args:
        logits: `(B, V)`.
        seen: `(B, V)` booleans, true for the tokens that a row holds.
        penalty: above 1 discourages.

    Source: Keskar et al. 2019, "CTRL", section 4.1, as transformers applies it.
    """
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalised, logits)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Sharpen (below 1) or flatten (above 1) the distribution of `logits` `(B, V)`."""
    return logits / temperature


def apply_top_k(logits: Tensor, k: int) -> Tensor:
    """Rule out all but the `k` greatest of `logits` `(B, V)`, and those that tie with the last."""
    kth = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def apply_top_p(logits: Tensor, p: float) -> Tensor:
    """Rule out the least likely tokens that together have no more than 1 - `p`; keep one at least.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.
    """
    ascending, order = logits.sort()
    ruled_out = ascending.softmax(-1).cumsum(-1) <= 1 - p  # (B, V)
    ruled_out[:, -1] = False
    return logits.masked_fill(ruled_out.scatter(-1, order, ruled_out), -math.inf)


def sample(logits: Tensor, config: GenerateConfig, uniform: Tensor) -> Tensor:
    """The next token `(B,)` of each row.

    Args:
        logits: `(B, V)`, after the repetition penalty.
        config: temperature, top-k and top-p, applied in this order as transformers does.
        uniform: `(B,)` float64 random numbers in [0, 1), one a row; greedy takes no notice.
    """
    if config.temperature == 0:
        return logits.argmax(-1)
    logits = apply_temperature(logits.float(), config.temperature)
    if config.top_k is not None:
        logits = apply_top_k(logits, config.top_k)
    if config.top_p is not None:
        logits = apply_top_p(logits, config.top_p)
    # Invert the cumulative distribution. float64: no token is too unlikely to be drawn, and since
    # uniform is at most 1 - 2**-53, the product stays below the total.
    cumulative = logits.double().softmax(-1).cumsum(-1)
    drawn = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, drawn, right=True)[:, 0]


def generate(
    model: GPT2, prompts: Sequence[Sequence[int]], config: GenerateConfig = GREEDY
) -> list[list[int]]:
    """Continue each prompt.

    Args:
        model: a GPT-2, with adapters or without; used in eval mode and left in its own.
        prompts: token ids; of any lengths, each gives what it gives alone.
        config: how to choose tokens and when to stop.

    Returns:
        The new tokens of each prompt, without the one that ended it.

    Raises:
        ValueError: listing the prompts that are empty, hold ids that the model does not know, or
            leave no room in its context.
    """
    texts: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(model, prompts, config):
        for text, token in zip(texts, tokens, strict=True):
            if token is not None:
                text.append(token)
    return texts


def stream(
    model: GPT2, prompts: Sequence[Sequence[int]], config: GenerateConfig = GREEDY
) -> Iterator[list[int | None]]:
    """As `generate`, token by token: each item holds one token a row, None for rows that stopped.

    Prompts are checked at once; between items the model is in its own mode, so that a stream may
    be left at any time.
    """
    _check(model, prompts, config.max_new_tokens)
    return _stream(model, prompts, config) if prompts else iter(())


def _stream(
    model: GPT2, prompts: Sequence[Sequence[int]], config: GenerateConfig
) -> Iterator[list[int | None]]:
    logits, cache = prefill(model, prompts, config.max_new_tokens)
    rows = torch.arange(len(prompts), device=logits.device)
    uniform = _random_numbers(len(prompts), config).to(logits.device)  # (tokens, B)
    seen = _seen(prompts, logits) if config.repetition_penalty != 1 else None
    running = [True] * len(prompts)
    for n in range(config.max_new_tokens):
        if seen is not None:
            logits = apply_repetition_penalty(logits.float(), seen, config.repetition_penalty)
        tokens = sample(logits, config, uniform[n])  # (B,)
        ids: list[int] = cast(Any, tokens).tolist()  # once a step the host waits for the device
        running = [runs and token != config.eos for runs, token in zip(running, ids, strict=True)]
        if not any(running):
            return
        yield [token if runs else None for token, runs in zip(ids, running, strict=True)]
        if n + 1 < config.max_new_tokens:
            if seen is not None:
                seen[rows, tokens] = True
            logits = step(model, tokens, cache)


@torch.no_grad()
def prefill(
    model: GPT2, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[Tensor, KVCache]:
    """Read the prompts: logits `(B, V)` after the last token of each, and the cache they fill."""
    weight = model.transformer.wte.weight
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=weight.device)
    longest = max(map(len, prompts))
    padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
    slots = longest + max_new_tokens
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    cache = KVCache(model.config, len(prompts), slots, dtype, weight.device)
    with _evaluating(model):
        hidden = model.transformer(torch.tensor(padded, device=weight.device), cache)  # (B, T, C)
        last = hidden[torch.arange(len(prompts), device=weight.device), lengths - 1]  # (B, C)
        logits = model.lm_head(last)
    cache.lengths = lengths  # the padding's slots are overwritten before they are ever seen
    return logits, cache


@torch.no_grad()
def step(model: GPT2, tokens: Tensor, cache: KVCache) -> Tensor:
    """Append one token `(B,)` to each row of the cache: logits `(B, V)` of the next."""
    with _evaluating(model):
        return model(tokens[:, None], cache)[:, -1]


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
