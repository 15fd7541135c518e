"""Text from a GPT-2, whole or as it comes.

How each token is made is in `gpt2.decoder`, and how the best of several texts is found in
`gpt2.beams`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from gpt2.beams import Beams
from gpt2.config import GPT2Config
from gpt2.decoder import GREEDY, Decoder
from gpt2.fast.decoding import burst
from gpt2.faults import listed
from gpt2.model import GPT2
from gpt2.prompts import Prompts, check, token_rows
from gpt2.sampling import GenerateConfig


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
    fetched in bursts. Beams take `num_beams` rows of the batch each.

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
    look = burst(next(model.parameters()).device)
    if config.num_beams > 1:
        return _searched(model, rows, config, look, compile) if rows else []
    texts: list[list[int]] = [[] for _ in rows]
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

    Raises:
        ValueError: as `generate`; and beams, whose text is known when the search has ended.
    """
    if config.num_beams > 1:
        raise ValueError(f"num_beams {config.num_beams} gives no tokens one by one: use generate.")
    rows = _checked(model, prompts, config)
    return _stream(model, rows, config, 1, compile) if rows else iter(())


def _stream(
    model: GPT2, rows: list[list[int]], config: GenerateConfig, look: int, compile: bool
) -> Iterator[list[int | None]]:
    """Tokens as they come, of which the host looks at `look` a time."""
    with _evaluating(model):
        decoder = Decoder(model, rows, config, compile=compile)
    running, ends = [True] * len(rows), set(config.ends)
    for start in range(0, config.max_new_tokens, look):
        stop = min(start + look, config.max_new_tokens)
        with _evaluating(model):
            for _ in range(max(start, 1), stop):
                decoder.step()
        for new, ids in enumerate(decoder.fetched(start, stop), start):
            running = [runs and t not in ends for runs, t in zip(running, ids, strict=True)]
            if not any(running):
                return
            tokens = [token if runs else None for token, runs in zip(ids, running, strict=True)]
            _refuse_not_finite({i: new for i, token in enumerate(tokens) if token == -1}, rows)
            yield tokens


def _searched(
    model: GPT2, rows: list[list[int]], config: GenerateConfig, look: int, compile: bool
) -> list[list[int]]:
    """The best text of each row, by beam search; the host looks every `look` tokens."""
    with _evaluating(model):
        beams = Beams(model, rows, config, compile=compile)
        for new in range(1, config.max_new_tokens):
            if new % look == 0 and not beams.are_open():
                break
            beams.step()
    _refuse_not_finite(beams.failures(), rows)
    return beams.best()


def _refuse_not_finite(failed: Mapping[int, int], rows: list[list[int]]) -> None:
    """Given the rows that failed, and after how many new tokens."""
    if failed:
        where = [
            f"prompt {i} after its {len(rows[i])} tokens and {new} new ones"
            for i, new in failed.items()
        ]
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
