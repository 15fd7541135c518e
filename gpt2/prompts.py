"""What `generate` is given, as lists of token ids, or an error that says what to give instead."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, cast

from torch import Tensor

from gpt2.config import GPT2Config
from gpt2.faults import listed

Prompts = Tensor | Sequence[Sequence[int]] | Sequence[Tensor]
"""A list of prompts, each of them integers; or a `(B, T)` tensor of prompts of one length."""


def token_rows(prompts: Prompts) -> list[list[int]]:
    """The ids of each prompt.

    Args:
        prompts: lists, tuples, tensors or arrays of integers.

    Raises:
        ValueError: listing the prompts that are no token ids.
    """
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or not _holds_integers(prompts):
            raise ValueError(
                f"Prompts as one tensor must be (B, T) integers, got {_described(prompts)}. "
                "A single prompt is prompt[None]."
            )
        return _listed_ids(prompts)
    given: Any = prompts  # callers need not keep to the types
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise ValueError(
            f"Prompts must be a list of token id lists, got {type(given).__name__}. "
            "Pass [tokenizer.encode(text)]."
        )
    rows: list[list[int]] = []
    faults: list[str] = []
    for i, prompt in enumerate(cast(Iterable[Any], given)):
        if isinstance(prompt, Integral):
            raise ValueError("One prompt was given where a list of prompts is due: pass [prompt].")
        try:
            rows.append(_ids(prompt))
        except (TypeError, ValueError) as error:
            faults.append(f"prompt {i} {error}")
    if faults:
        raise ValueError(f"Nothing was generated: {listed(faults)}.")
    return rows


def check(rows: Sequence[Sequence[int]], config: GPT2Config, max_new_tokens: int) -> None:
    """Whether the model can continue all prompts by so many tokens.

    Raises:
        ValueError: listing the prompts that are empty, hold ids that the model does not know, or
            leave no room in its context.
    """
    limit, vocab_size = config.block_size, config.vocab_size
    faults: list[str] = []
    for i, row in enumerate(rows):
        if not row:
            faults.append(f"prompt {i} is empty (start with the end-of-text id instead)")
        elif not 0 <= min(row) <= max(row) < vocab_size:
            faults.append(f"prompt {i} holds ids outside 0..{vocab_size - 1}")
        elif len(row) + max_new_tokens > limit:
            faults.append(
                f"prompt {i} has {len(row)} tokens, and with {max_new_tokens} new ones passes "
                f"the context of {limit}"
            )
    if faults:
        raise ValueError(f"Nothing was generated: {listed(faults)}.")


def _ids(prompt: Any) -> list[int]:
    """One prompt's ids; the error continues "prompt 3 …"."""
    if isinstance(prompt, (str, bytes)):
        raise ValueError("is text (encode it first, with tokenizer.encode)")
    if isinstance(prompt, Tensor):
        if prompt.dim() != 1 or not _holds_integers(prompt):
            raise ValueError(f"is a tensor {_described(prompt)} (it should be (T,) integers)")
        return _listed_ids(prompt)
    if not isinstance(prompt, Iterable):
        raise ValueError(f"is a {type(prompt).__name__} (it should be a list of token ids)")
    return [_id(element) for element in cast(Iterable[Any], prompt)]


def _id(element: Any) -> int:
    """A Python, NumPy or PyTorch integer; True is none."""
    if isinstance(element, bool) or (isinstance(element, Tensor) and not _holds_integers(element)):
        raise ValueError(f"holds {element!r}, which is no token id")
    try:
        return operator.index(element)
    except TypeError:
        raise ValueError(f"holds {element!r}, which is no token id") from None


def _holds_integers(tensor: Tensor) -> bool:
    return tensor.dtype.is_signed and not (tensor.is_floating_point() or tensor.is_complex())


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _listed_ids(tensor: Tensor) -> Any:
    return cast(Any, tensor).tolist()
