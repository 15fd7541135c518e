"""What a run observes of its adapter when it ends, so that a report needs no model."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch

import gpt2
import lora
from inputs import Reader
from validation import Apart

LONGEST, PASSAGES = 128, 3  # tokens of a passage; passages


def of(reader: Reader, apart: Apart, adapter: str = "default") -> dict[str, Any]:
    """The machine; the log-probability of each token of a passage before and after; the updates.

    The passages are the first of the held-out data, or of the test data, or else of what was learnt.
    """
    model = reader.model
    known = (("Held-out text", apart.held_out), ("Test text", apart.tested))
    name, data = next(((n, d) for n, d in known if d), ("Text that it was trained on", apart.learnt))
    shown = range(min(PASSAGES, len(data)))
    passages = [_passage(reader, data[i][0][:LONGEST]) for i in shown]
    seen = {"from": name, "passages": passages, "updates": _updates(model, adapter)}
    return {"machine": _machine(model), "observed": seen}


def _passage(reader: Reader, ids: torch.Tensor) -> dict[str, Any]:
    model = reader.model
    with lora.disabled(model):
        base = _log_probabilities(model, ids)
    tuned = _log_probabilities(model, ids)
    words = [reader.tokenizer.decode([int(i)]) for i in ids]
    rows = zip(words, [None, *base], [None, *tuned], strict=True)
    return {"tokens": [list(row) for row in rows]}


def _log_probabilities(model: gpt2.GPT2, ids: torch.Tensor) -> list[float]:
    """Of each token but the first, in nats."""
    training = model.training
    idx = ids[None].to(next(model.parameters()).device)
    try:
        with torch.no_grad():
            logits = model.eval()(idx[:, :-1])
    finally:
        model.train(training)
    found = logits[0].float().log_softmax(-1).gather(-1, idx[0, 1:, None])
    return [round(value, 5) for value in found[:, 0].tolist()]


def _updates(model: gpt2.GPT2, adapter: str) -> list[dict[str, Any]]:
    """The Frobenius norm of each s·BA and of its weight: ‖BA‖² is the trace of (BᵀB)(AAᵀ)."""
    try:
        factors = lora.algebra.factors(model, adapter)
    except ValueError:  # it trains whole copies or biases, which are no products
        return []
    weights = {name.removesuffix(".weight"): w for name, w in model.state_dict().items()}
    found: list[dict[str, Any]] = []
    with lora.disabled(model), torch.no_grad():
        for layer, pair in factors.items():
            A, B = pair.A.float(), pair.B.float()
            squared = ((B.T @ B) * (A @ A.T)).sum().clamp_min(0)
            norms: Mapping[str, torch.Tensor] = {
                "update": squared.sqrt(),
                "weight": weights[layer].float().norm(),
            }
            found.append({"layer": layer, **{k: float(v) for k, v in norms.items()}})
    return found


def _machine(model: gpt2.GPT2) -> str:
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"
