"""The GPT-2 checkpoints that loralib's authors published: query and value of every `c_attn`.

They are pickles, the one exception to "safetensors only": this reader is never called by another,
and it lets `torch.load` build tensors and nothing else.

Source: microsoft/LoRA, examples/NLG, whose `MergedLinear` has the layout read here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora.building import build
from lora.config import UpdateConfig
from lora.injection import attach
from lora.layout import out_in_view, why_not_adaptable
from lora.slices import spans_of
from lora.tree import survey
from lora.updates import LowRankUpdate

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
    if isinstance(state, dict):
        state = cast(dict[str, Any], state).get("model_state_dict", state)
    if not isinstance(state, dict):
        raise ValueError(f"{file} is no checkpoint: it holds no tensors by name.")
    factors: dict[str, dict[str, Tensor]] = {}
    strange: list[str] = []  # what else is an adapter's; the base's own tensors may stand beside
    for key, tensor in cast(dict[str, Any], state).items():
        match = _KEY.fullmatch(key)
        if match and isinstance(tensor, Tensor):
            factors.setdefault(match[1], {})[match[2]] = tensor
        elif "lora_" in key:
            strange.append(f"{key}: left over")
    tree = survey(model)
    modules = tree.bases
    updates: dict[str, LowRankUpdate] = {}
    faults = strange if factors else [*strange, "it holds no c_attn.lora_A and lora_B"]
    faults += [
        f"{path}: no tensors in the file"
        for path in modules
        if path.endswith("c_attn") and path not in factors
    ]
    for path, pair in factors.items():
        try:
            updates[path] = _rebuild(modules.get(path), pair, alpha)
        except ValueError as error:
            faults.append(f"{path}: {error}")
    if faults:
        raise ValueError(f"{file} does not fit this model: {'; '.join(faults)}.")
    return attach(tree, adapter, updates)


def _rebuild(base: nn.Module | None, pair: Mapping[str, Tensor], alpha: float) -> LowRankUpdate:
    """loralib stacks q's factors on v's, just as a sliced update does."""
    if reason := "no such layer here" if base is None else why_not_adaptable(base):
        raise ValueError(reason)
    if missing := [f"lora_{name} is missing" for name in "AB" if name not in pair]:
        raise ValueError(", ".join(missing))
    base, a, b = cast(nn.Module, base), pair["A"], pair["B"]
    b = b.squeeze(-1) if b.dim() == 3 else b
    spans = spans_of(base, ("q", "v"), ("q", "k", "v"))
    out_features, in_features = out_in_view(base, base.get_parameter("weight")).shape
    r = len(a) // 2 if a.dim() else 0
    config = UpdateConfig(r=r, alpha=alpha, dropout=0.0).stacked(2)
    third = out_features // 3
    wanted = (2 * r, in_features), (2 * third, r)
    if (found := (tuple(a.shape), tuple(b.shape))) != wanted:
        raise ValueError(f"A and B are {found}, this layer takes {wanted}")
    whole = b.new_zeros(out_features, 2 * r)
    whole[:third, :r], whole[2 * third :, r:] = b[:third], b[third:]
    return build(base, config, a, whole, spans=spans)
