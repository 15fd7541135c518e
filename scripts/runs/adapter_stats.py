"""What an adapter does to the tokens of a passage, and to each layer's weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gpt2
import lora

from .answers import pieces
from .data import Split

LOOKED_AT = 16  # examples, of which the longest is the passage


def measure(model: gpt2.GPT2, split: Split, tokenizer: gpt2.Tokenizer) -> dict[str, Any]:
    """Both, for the record of a run, of the active adapter."""
    data = split.validation if split.validation is not None else split.train
    few = [data[i][0] for i in range(min(len(data), LOOKED_AT))]
    stats: dict[str, Any] = {"updates": updates(model)}
    if (ids := max(few, key=len, default=None)) is not None and len(ids) > 1:
        with lora.disabled(model):
            base = log_probabilities(model, ids)
        *texts, rest = pieces(ids.tolist(), tokenizer)
        stats["passage"] = {
            "held_out": split.validation is not None,
            "tokens": [*texts[:-1], texts[-1] + rest],
            "base": base,
            "adapter": log_probabilities(model, ids),
        }
    return stats


@torch.no_grad()
def log_probabilities(model: gpt2.GPT2, ids: Tensor) -> list[float]:
    """Of each token but the first, in nats, `(T - 1,)`."""
    row = ids.to(next(model.parameters()).device)[None]
    logits = model(row[:, :-1]).float()
    values = logits.log_softmax(-1).gather(-1, row[:, 1:, None])
    return [round(value, 4) for value in values.flatten().tolist()]


@torch.no_grad()
def updates(model: gpt2.GPT2) -> list[dict[str, Any]]:
    """The Frobenius norms of each active `s · B A` and of the weight beside it."""
    return [
        {
            "layer": path,
            "update": float(f"{float((weight * update.delta().float()).norm()):.6g}"),
            "weight": float(f"{float(layer.weight_out_in.float().norm()):.6g}"),
        }
        for path, layer in model.named_modules()
        if isinstance(layer, lora.LoRALinear)
        for update, weight in layer.active_updates()
    ]
