"""The GPT-2 checkpoints that loralib's authors published: query and value of every `c_attn`.

They are pickles, the one exception to "safetensors only": this reader is never called by another,
and it lets `torch.load` build tensors and nothing else.

Source: microsoft/LoRA, examples/NLG, whose `MergedLinear` has the layout read here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora.inject import attach, make_update
from lora.layer import LowRankUpdate, UpdateConfig
from lora.slices import spans_of
from lora.targets import base_modules, unwrap

_KEY = re.compile(r"(?:module\.)?(.+\.c_attn)\.lora_([AB])")


def load_loralib(
    model: nn.Module, file: str | Path, *, alpha: float = 32, adapter: str = "default"
) -> list[str]:
    """Put one of loralib's published GPT-2 adapters on the model and make it the active one.

    Args:
        model: the GPT-2 that it was made for.
        file: a pickled dict, `….c_attn.lora_A` `(2r, in)` and `….lora_B` `(2·in, r)` or, as saved
            for a convolution, with a last axis of 1.
        alpha: the file does not say; the published ones have 32 (with r = 4).
        adapter: the name to give it.

    Returns:
        The dotted paths of the adapted layers.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such checkpoint, or listing what does not fit the model.
        RuntimeError: the model is merged or routed.
        The model is as it was after any error.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} is missing.")
    try:
        state: Any = cast(Any, torch).load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{file} is no checkpoint of tensors: {error}") from None
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in cast(dict[str, Any], state.get("model_state_dict", state)).items():
        if match := _KEY.fullmatch(key):
            factors.setdefault(match[1], {})[match[2]] = tensor
    modules = base_modules(model)
    updates: dict[str, LowRankUpdate] = {}
    faults: list[str] = [] if factors else ["it holds no c_attn.lora_A and lora_B"]
    faults += [
        f"{path}: no tensors in the file"
        for path in modules
        if path.endswith("c_attn") and path not in factors
    ]
    for path, pair in factors.items():
        try:
            updates[path] = _rebuild(modules[path], pair["A"], pair["B"].squeeze(-1), alpha)
        except KeyError as error:
            faults.append(f"{path}: {error} is missing")
        except (ValueError, RuntimeError) as error:
            faults.append(f"{path}: {error}")
    if faults:
        raise ValueError(f"{file} does not fit this model: {'; '.join(faults)}.")
    return attach(unwrap(model), adapter, updates)


def _rebuild(base: nn.Module, a: Tensor, b: Tensor, alpha: float) -> LowRankUpdate:
    """loralib stacks q's factors on v's, just as a sliced update does."""
    config = UpdateConfig(r=a.shape[0] // 2, alpha=alpha, dropout=0.0)
    update = make_update(base, config, spans=spans_of(base, ("q", "v"), ("q", "k", "v")))
    if update.A.shape != a.shape or update.B.shape != b.shape:
        found, wanted = (
            (tuple(a.shape), tuple(b.shape)),
            (tuple(update.A.shape), tuple(update.B.shape)),
        )
        raise ValueError(f"A and B are {found}, this layer takes {wanted}")
    with torch.no_grad():
        update.A.copy_(a)
        update.B.copy_(b)
    return update
