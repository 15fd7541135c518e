"""What a run observes of its adapter when it ends, so that a report needs no model."""

from __future__ import annotations

import platform
from typing import Any, cast

import torch

import gpt2
import lora
from inputs import Reader
from validation import Apart

LONGEST, PASSAGES = 128, 3  # tokens of a passage; passages


def of(reader: Reader, apart: Apart, adapter: str = "default") -> dict[str, Any]:
    """The machine; each token's log-probability in a passage, before and after; the updates.

    The passages are the first held-out ones, or of the test data, or else of what was learnt.
    """
    known = (("Held-out text", apart.held_out), ("Test text", apart.tested))
    learnt = ("Text that it was trained on", apart.learnt)
    name, data = next(((n, d) for n, d in known if d), learnt)
    shown = range(min(PASSAGES, len(data)))
    passages = [_passage(reader, data[i][0][:LONGEST]) for i in shown]
    seen = {"from": name, "passages": passages, "updates": updates(reader.model, adapter)}
    return {"machine": _machine(reader.model), "observed": seen}


def around(reader: Reader) -> dict[str, Any]:
    """What was asked and where it runs, of a run of several adapters."""
    asked = {k: v for k, v in reader.options.as_dict().items() if k != "config"}
    device = str(next(reader.model.parameters()).device)
    return {"config": asked, "device": device, "machine": _machine(reader.model)}


def updates(model: gpt2.GPT2, adapter: str) -> list[dict[str, Any]]:
    """The Frobenius norm of each s·BA and of its weight: ‖BA‖² is the sum of (BᵀB)∘(AAᵀ)."""
    try:
        factors = lora.algebra.factors(model, adapter)
    except ValueError:  # it trains whole copies or biases, which are no products
        return []
    found: list[dict[str, Any]] = []
    with lora.disabled(model), torch.no_grad():
        for layer, pair in factors.items():
            A, B = pair.A.float(), pair.B.float()
            squared = ((B.T @ B) * (A @ A.T)).sum().clamp_min(0)
            weight = cast(torch.Tensor, model.get_submodule(layer).weight)
            row = {"layer": layer, "update": float(squared.sqrt())}
            found.append(row | {"weight": float(weight.float().norm())})
    return found


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
    if idx.shape[1] < 2:
        return []
    try:
        with torch.no_grad():
            logits = model.eval()(idx[:, :-1])
    finally:
        model.train(training)
    found = logits[0].float().log_softmax(-1).gather(-1, idx[0, 1:, None])
    return [round(value, 5) for value in found[:, 0].tolist()]


def _machine(model: gpt2.GPT2) -> str:
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"{platform.machine()} CPU, {count} thread{'s' * (count > 1)}"
