"""The GPT-2 checkpoints that loralib's authors published: query and value of every `c_attn`.

They are pickles, the one exception to "safetensors only": `load_loralib` alone reads any, only the
file that the caller names, and with `torch.load(weights_only=True)`, which builds tensors and plain
containers and calls nothing else that a file names. No other function of this package calls it.

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
from lora.messages import brief, cut, listed
from lora.slices import spans_of
from lora.tree import survey
from lora.updates import LowRankUpdate
from lora.values import why_not_usable

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
        raise ValueError(f"{cut(file)} is no checkpoint of tensors: {cut(error)}") from None
    if isinstance(state, dict):
        state = cast(dict[str, Any], state).get("model_state_dict", state)
    if not isinstance(state, dict):
        raise ValueError(f"{file} is no checkpoint: it holds no tensors by name.")
    factors, faults = _sorted(cast(dict[object, object], state))
    tree = survey(model)
    modules = tree.bases
    faults += [
        f"{path}: no tensors in the file"
        for path in modules
        if path.endswith("c_attn") and path not in factors
    ]
    updates: dict[str, LowRankUpdate] = {}
    for path, pair in factors.items():
        try:
            updates[path] = _rebuild(modules.get(path), pair, alpha)
        except ValueError as error:
            faults.append(f"{cut(path, 120)}: {error}")
    if faults:
        raise ValueError(f"{cut(file)} does not fit this model: {listed(faults)}.")
    return attach(tree, adapter, updates)


def _sorted(state: Mapping[object, object]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """A and B by the path of their layer, and what else is an adapter's.

    The base's own tensors may stand beside.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    faults: list[str] = []
    for key, tensor in state.items():
        match = _KEY.fullmatch(key) if isinstance(key, str) else None
        if match and isinstance(tensor, Tensor):
            if factors.setdefault(match[1], {}).setdefault(match[2], tensor) is not tensor:
                faults.append(f"{cut(key, 120)}: it stands twice, with and without 'module.'")
        elif not isinstance(key, str):
            faults.append(f"the key {brief(key)} is no name")
        elif "lora_" in key:
            faults.append(f"{key}: left over")
    if not factors:
        faults.append("it holds no c_attn.lora_A and lora_B")
    return factors, faults


def _rebuild(base: nn.Module | None, pair: Mapping[str, Tensor], alpha: float) -> LowRankUpdate:
    """loralib stacks q's factors on v's, just as a sliced update does."""
    if reason := "no such layer here" if base is None else why_not_adaptable(base):
        raise ValueError(reason)
    if missing := [f"lora_{name} is missing" for name in "AB" if name not in pair]:
        raise ValueError(", ".join(missing))
    base, a, b = cast(nn.Module, base), pair["A"], pair["B"]
    b = b.squeeze(-1) if b.dim() == 3 else b
    if faults := [f"lora_{n} {why}" for n, t in (("A", a), ("B", b)) if (why := why_not_usable(t))]:
        raise ValueError(", ".join(faults))
    spans = spans_of(base, ("q", "v"), ("q", "k", "v"))
    out_features, in_features = out_in_view(base, base.get_parameter("weight")).shape
    r, third = len(a) // 2 if a.dim() else 0, out_features // 3
    config = UpdateConfig(r=r, alpha=alpha, dropout=0.0).stacked(2)
    wanted = (2 * r, in_features), (2 * third, r)
    if (found := (tuple(a.shape), tuple(b.shape))) != wanted:
        raise ValueError(f"A and B are {found}, this layer takes {wanted}")
    whole = b.new_zeros(out_features, 2 * r)
    whole[:third, :r], whole[2 * third :, r:] = b[:third], b[third:]
    return build(base, config, a, whole, spans=spans)
