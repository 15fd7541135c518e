"""What an adapter does to its base: to each token of a passage, and to each layer's weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gpt2
import lora
from gpt2.training.modes import in_mode
from lora.tree import survey_adapted

from .validation import Apart

LOOKED_AT = 16  # first examples, of which the longest is the passage


def measured(model: gpt2.GPT2, apart: Apart, tokenizer: gpt2.Tokenizer) -> dict[str, Any]:
    """Both, for the record of a run: of the adapter in force, at the end of its training."""
    data = apart.held_out if apart.held_out is not None else apart.learnt
    few = [data[i][0] for i in range(min(len(data), LOOKED_AT))]
    found: dict[str, Any] = {"updates": updates(model)}
    if (ids := max(few, key=len, default=None)) is not None and len(ids) > 1:
        with lora.disabled(model):
            base = log_probabilities(model, ids)
        found["passage"] = {
            "held_out": apart.held_out is not None,
            "tokens": pieces(ids.tolist(), tokenizer),
            "base": base,
            "adapter": log_probabilities(model, ids),
        }
    return found


def looked(apart: Apart, tokenizer: gpt2.Tokenizer) -> Callable[[gpt2.GPT2], dict[str, Any]]:
    """The same, of a model that is not there yet."""
    return partial(measured, apart=apart, tokenizer=tokenizer)


def log_probabilities(model: gpt2.GPT2, ids: Tensor) -> list[float]:
    """Of each token but the first, given those before it, in nats, `(T - 1,)`."""
    row = ids.to(next(model.parameters()).device)[None]
    with in_mode(model, training=False), torch.no_grad():
        logits = model(row[:, :-1]).float()
    found = logits.log_softmax(-1).gather(-1, row[:, 1:, None])
    return [round(value, 4) for value in found.flatten().tolist()]


def pieces(ids: list[int], tokenizer: gpt2.Tokenizer) -> list[str]:
    """Each token's text; a character of several tokens stands at its last, the others are empty."""
    shown, found = "", list[str]()
    for end in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[:end])
        settled = whole if end == len(ids) else whole.rstrip("\N{REPLACEMENT CHARACTER}")
        found.append(settled[len(shown) :])
        shown += found[-1]
    return found


def updates(model: gpt2.GPT2) -> list[dict[str, Any]]:
    """The Frobenius norms of each active update `s · B A` and of the weight beside it."""
    return [
        {
            "layer": path,
            "update": float(f"{abs(weight * update.config.scaling) * norm(*update.factors()):.6g}"),
            "weight": float(f"{float(torch.linalg.vector_norm(layer.weight_out_in.float())):.6g}"),
        }
        for path, layer in survey_adapted(model).layers.items()
        for update, weight in layer.active_updates()
    ]


def norm(a: Tensor, b: Tensor) -> float:
    """`‖B A‖`, by `‖B A‖² = tr((Bᵀ B)(A Aᵀ))`: the product, as large as the weight, is not made."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())
