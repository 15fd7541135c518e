"""Adapters on disk, in PEFT's format: a folder with a config and a safetensors file.

The metadata of our own files adds probes of the base and of the factors (see `lora.probes`) and
the names of slices; readers that know neither see a plain PEFT adapter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.config import UpdateConfig
from lora.disk import files, peft_config, probes
from lora.disk.peft_config import PeftConfig
from lora.injection import attach, build
from lora.layer import EmbeddingUpdate, LowRankUpdate
from lora.layout import is_fan_in_fan_out, out_in_view, why_not_adaptable
from lora.slices import SlicedUpdate
from lora.tree import survey, survey_adapted

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SLICES = "lora_slices"  # key in the metadata: which slices' blocks a plain B holds
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")


@dataclass(frozen=True)
class SavedAdapter:
    """What an adapter folder holds; `factors` are A and B by the path of their layer."""

    config: PeftConfig
    factors: Mapping[str, Mapping[str, Tensor]]
    left_over: tuple[str, ...]
    metadata: Mapping[str, str]


def save(
    model: nn.Module, folder: str | Path, *, adapter: str = "default", uniform: bool = False
) -> None:
    """Write an adapter as PEFT does; the same adapter gives the same bytes.

    Both files are written beside their places and then renamed, so that after a failure, such as a
    full disk, the adapter that was there before still is.

    Args:
        model: a model that carries the adapter, merged or not.
        folder: created if missing.
        adapter: the adapter's name.
        uniform: write one rank and one alpha for all layers (B scaled, both padded with zeros),
            for readers that know no patterns.

    Raises:
        RuntimeError: the model carries no adapter.
        ValueError: none of this name, or NaN or infinity in its factors.
        OSError: the folder cannot be written.
    """
    tree = survey_adapted(model)
    layers = tree.carrying(adapter)
    updates = {path: cast(LowRankUpdate, la.updates[adapter]) for path, la in layers.items()}
    configs = {path: update.config for path, update in updates.items()}
    if meta := [path for path, update in updates.items() if update.A.is_meta]:
        raise ValueError(f"Not saved: {meta[0]} is on the meta device, which holds no values.")
    factors = {path: _on_cpu(*update.factors()) for path, update in updates.items()}
    bad = [p for p, pair in factors.items() if not all(torch.isfinite(f).all() for f in pair)]
    if bad:
        raise ValueError(f"Not saved: NaN or infinity in A or B of {', '.join(bad)}.")
    if uniform:
        configs, factors = _uniform(configs, factors)
    bases = {path: layer.base for path, layer in layers.items()}
    config = peft_config.dumps(
        configs,
        linear_paths=[path for path, m in tree.bases.items() if not why_not_adaptable(m)],
        fan_in_fan_out=any(is_fan_in_fan_out(base) for base in bases.values()),
        causal_lm=hasattr(tree.root, "lm_head"),
        base_name=getattr(tree.root, "name_or_path", None),
    )
    metadata = {"format": "pt", **probes.describe(bases, factors)}
    slices = {p: u.slices for p, u in updates.items() if isinstance(u, SlicedUpdate)}
    if slices and not uniform:
        metadata[SLICES] = json.dumps(slices)
    tensors = {
        _key(path, name, updates[path]): factor
        for path, pair in factors.items()
        for name, factor in zip("AB", pair, strict=True)
    }
    weights = files.to_bytes(tensors, metadata)
    files.write(Path(folder), {WEIGHTS: weights, CONFIG: config.encode()})


def load(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter: str = "default",
    allow_base_mismatch: bool = False,
    untie: bool = False,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Put a saved adapter, ours or PEFT's, on the model and make it the active one.

    Args:
        model: the base that the adapter was made for.
        folder: as `save` or PEFT's `save_pretrained` wrote it.
        adapter: the name to give it.
        allow_base_mismatch: accept base weights other than those it was made for.
        untie, dtype: as for `lora.inject`.

    Returns:
        The dotted paths of the adapted layers.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: listing all faults: tensors missing, left over, mis-shaped or not finite,
            another base, an unreadable file, features of PEFT that are not supported.
        RuntimeError: the model is merged or routed.
        The model is as it was after any error.
    """
    saved = open_folder(Path(folder))
    tree = survey(model)
    modules = tree.bases
    wanted = {p for p, m in modules.items() if saved.config.matches(p) and not why_not_adaptable(m)}
    faults = [f"{key}: left over" for key in saved.left_over]
    faults += [f"{path}: no tensors in the file" for path in sorted(wanted - saved.factors.keys())]
    for path in sorted(saved.factors.keys() - wanted):
        known = "not a target of the config" if path in modules else "no such layer here"
        faults.append(f"{path}: {known}")
    updates: dict[str, LowRankUpdate] = {}
    for path in [path for path in modules if path in wanted and path in saved.factors]:
        try:
            updates[path] = _rebuild(modules[path], path, saved, dtype)
        except ValueError as error:
            faults.append(f"{path}: {error}")
    if not faults:
        factors = {path: update.factors() for path, update in updates.items()}
        bases = {path: modules[path] for path in updates}
        faults = probes.faults(saved.metadata, bases, factors, allow_base_mismatch)
    if faults:
        raise ValueError(f"{folder} does not fit this model: {'; '.join(faults)}.")
    return attach(tree, adapter, updates, untie=untie)


def open_folder(folder: Path) -> SavedAdapter:
    """Read an adapter folder without a model to put it on.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    config = peft_config.read(folder / CONFIG)
    tensors, metadata = files.read(folder / WEIGHTS)
    factors: dict[str, dict[str, Tensor]] = {}
    left_over: list[str] = []
    for key, tensor in tensors.items():
        if match := _KEY.fullmatch(key):
            path = match[1].replace("_orig_mod.", "").removeprefix("module.")
            if match[2] not in (pair := factors.setdefault(path, {})):
                pair[match[2]] = tensor
                continue
        left_over.append(key)
    return SavedAdapter(config, factors, tuple(left_over), metadata)


def _rebuild(
    base: nn.Module, path: str, saved: SavedAdapter, dtype: torch.dtype | None
) -> LowRankUpdate:
    """The saved update of one layer; ValueError lists what does not fit."""
    config = saved.config.update_config(path)
    spans = _spans(saved.metadata, path, base)
    factors = saved.factors[path]
    if missing := [f"lora_{name} is missing" for name in "AB" if name not in factors]:
        raise ValueError(", ".join(missing))
    return build(base, config, factors["A"], factors["B"], spans=spans, dtype=dtype)


def _spans(metadata: Mapping[str, str], path: str, base: nn.Module) -> dict[str, tuple[int, int]]:
    """The slices that a file says one layer's blocks are for."""
    out_features = out_in_view(base, base.get_parameter("weight")).shape[0]
    try:
        spans: dict[str, tuple[int, int]] = json.loads(metadata.get(SLICES, "{}")).get(path, {})
        bounds = [0, *(bound for span in sorted(spans.values()) for bound in span), out_features]
        sound = bounds == sorted(bounds) and all(start < stop for start, stop in spans.values())
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the slices in its metadata are malformed ({error})") from None
    if not sound:
        raise ValueError(f"the slices in its metadata do not fit {out_features} outputs")
    return spans


def _uniform(
    configs: Mapping[str, UpdateConfig], factors: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[dict[str, UpdateConfig], dict[str, tuple[Tensor, Tensor]]]:
    """The same deltas with one rank, and an alpha that makes the scaling 1."""
    r = max(config.r for config in configs.values())
    padded: dict[str, tuple[Tensor, Tensor]] = {}
    for path, (a, b) in factors.items():
        b = (b.double() * configs[path].scaling).to(b.dtype)
        missing = r - configs[path].r
        padded[path] = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
    return {p: replace(c, r=r, alpha=r, rslora=False) for p, c in configs.items()}, padded


def _key(path: str, factor: str, update: LowRankUpdate) -> str:
    if isinstance(update, EmbeddingUpdate):
        return f"base_model.model.{path}.lora_embedding_{factor}"
    return f"base_model.model.{path}.lora_{factor}.weight"


def _on_cpu(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
