"""Adapters on disk, in PEFT's format: a folder with a config and a safetensors file.

The metadata of our own files adds a digest of the config, probes of the base and of the factors
(see `lora.disk.probes`) and the names of slices; readers that know none see a plain PEFT adapter.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from lora.copies import ModuleCopy, own_tensors
from lora.disk import card as cards
from lora.disk import files, fitting, peft_config, peft_writing, probes
from lora.disk.fitting import SLICES
from lora.disk.folder import CONFIG, PAIR, WEIGHTS, open_folder, to_tensors
from lora.disk.hub import as_path
from lora.disk.writing import replacing
from lora.injection import attach
from lora.layout import is_fan_in_fan_out
from lora.messages import cut, listed
from lora.slices import SlicedUpdate
from lora.tree import Tree, survey, survey_adapted
from lora.untyped import is_first, whole
from lora.updates import EmbeddingUpdate, LowRankUpdate
from lora.values import why_not_usable

__all__ = ["CONFIG", "SLICES", "WEIGHTS", "load", "open_folder", "save"]


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter: str = "default",
    uniform: bool = False,
    card: bool = False,
) -> None:
    """Write an adapter as PEFT does; the same adapter gives the same bytes.

    All files are written beside their places and then renamed, so that after a failure, such as a
    full disk, the adapter that was there before still is; a reader at that moment, or after a kill
    at that moment, never takes the new weights for the old config's.

    Args:
        model: a model that carries the adapter, merged or not. Of a sharded one call this in each
            process: they put the adapter together, and the first writes.
        folder: created if missing.
        adapter: the adapter's name.
        uniform: write one rank and one alpha for all layers (B scaled, both padded with zeros),
            for readers that know no patterns.
        card: write a README.md too, which says in plain words what the folder holds.

    Raises:
        RuntimeError: the model carries no adapter.
        ValueError: none of this name, factors that are not finite or no floats, or a README.md
            that is not ours.
        OSError: the folder cannot be written.

    Warns:
        UserWarning: other parameters of the model require grad, and are not saved.
    """
    tree, place = survey_adapted(model), as_path(folder)
    updates = _updates(tree, adapter)
    if card:
        cards.require_free(place)
    configs = {path: update.config for path, update in updates.items()}
    factors = {path: _pair(u) for path, u in updates.items()}
    copies, biases = _trained_beside(tree, adapter)
    _require_usable(factors, "")
    if uniform:
        configs, factors = peft_writing.uniform(configs, factors)
        _require_usable(factors, " once alpha / r is in B (save without uniform=True)")
    bases = {path: tree.bases[path] for path in updates}
    config = peft_writing.dumps(
        configs,
        paths=tree.bases.keys(),
        fan_in_fan_out=any(map(is_fan_in_fan_out, bases.values())),
        causal_lm=hasattr(tree.root, "lm_head"),
        base_name=_base_name(tree),
        copies=copies,
        biases=biases,
    )
    metadata = {"format": "pt", PAIR: peft_config.parse(config).digest}
    metadata |= probes.describe(bases, factors)
    metadata |= {} if uniform else _slices(updates)
    weights = files.to_bytes(to_tensors(factors, _embeddings(updates), copies, biases), metadata)
    content = {WEIGHTS: weights, CONFIG: config.encode()}
    if card:
        size = sum(a.numel() + b.numel() for a, b in factors.values())
        content[cards.CARD] = cards.write(_base_name(tree), configs, size).encode()
    if is_first(tree.root.parameters()):
        _write(place, content)
    _warn_of_others(tree)


def load(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter: str = "default",
    allow_base_mismatch: bool = False,
    untie: bool = False,
    dtype: torch.dtype | None = None,
    trainable: bool = True,
) -> list[str]:
    """Put a saved adapter, ours or PEFT's, on the model and make it the active one.

    The base is frozen, as by `lora.inject`. The updates are in the mode, training or eval, of their
    layers, and have the saved dropout, which acts in training mode.

    Args:
        model: the base that the adapter was made for.
        folder: as `save` or PEFT's `save_pretrained` wrote it; a string that names no folder here
            may be "org/repo" on the Hub.
        adapter: the name to give it.
        allow_base_mismatch: accept base weights other than those it was made for.
        untie, dtype: as for `lora.inject`.
        trainable: whether the loaded factors require grad; False for inference.

    Returns:
        The dotted paths of the adapted layers.

    Raises:
        FileNotFoundError: a file or a repository is missing.
        ConnectionError: the Hub is out of reach and its cache does not have the files.
        ValueError: listing all faults: tensors missing, left over, mis-shaped or not finite,
            another base, an unreadable file, features of PEFT that are not supported.
        RuntimeError: the model is merged or routed.
        The model is as it was after any error.
    """
    saved, tree = open_folder(folder), survey(model)
    tree.require_whole()
    modules = tree.bases
    places = fitting.places(saved.factors, modules)
    updates, faults = fitting.rebuild(saved, modules, places, dtype)
    copies, unfit = fitting.restore(saved, modules, updates)
    faults += [*unfit, *fitting.strangers(saved, modules, allow_base_mismatch)]
    if not faults:
        factors = {path: update.factors() for path, update in updates.items()}
        bases = {path: modules[places[path]] for path in updates}
        faults = probes.faults(saved.metadata, bases, factors, allow_base_mismatch)
    if faults:
        raise ValueError(f"{cut(folder)} does not fit this model: {listed(faults)}.")
    placed = {**{places[path]: update for path, update in updates.items()}, **copies}
    if not trainable:
        for update in placed.values():
            update.requires_grad_(False)
    return attach(tree, adapter, placed, untie=untie)


def _write(place: Path, content: Mapping[str, bytes]) -> None:
    with replacing(place) as beside:
        for name, found in content.items():
            (beside / name).write_bytes(found)


def _updates(tree: Tree, adapter: str) -> dict[str, LowRankUpdate]:
    """The adapter's low-rank updates, by the path of their layer."""
    updates = {
        path: tree.layers[path].update(adapter)
        for path in tree.carrying(adapter)
        if path in tree.layers
    }
    if not updates:
        raise ValueError(f"{adapter!r} has no low-rank update, and PEFT's format needs one.")
    if meta := [path for path, update in updates.items() if update.A.is_meta]:
        raise ValueError(f"Not saved: A of {meta[0]} is on the meta device, which holds no values.")
    return updates


def _slices(updates: Mapping[str, LowRankUpdate]) -> dict[str, str]:
    """What a file says of the slices whose blocks a plain B holds."""
    slices = {p: u.slices for p, u in updates.items() if isinstance(u, SlicedUpdate)}
    return {SLICES: json.dumps(slices)} if slices else {}


def _embeddings(updates: Mapping[str, LowRankUpdate]) -> set[str]:
    return {path for path, update in updates.items() if isinstance(update, EmbeddingUpdate)}


def _trained_beside(
    tree: Tree, adapter: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """What the adapter trains beside its updates: whole modules, and biases, by path."""
    copies: dict[str, dict[str, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    for path, module in tree.carrying(adapter).items():
        update = module.updates[adapter]
        if isinstance(module, ModuleCopy):
            own = own_tensors(module.base, update)
            if set(own) == {"bias"} and len(module.base.state_dict()) > 1:
                biases[path] = _on_cpu(own["bias"])
            else:
                copies[path] = {name: _on_cpu(tensor) for name, tensor in own.items()}
        elif (bias := cast(LowRankUpdate, update).bias) is not None:
            biases[path] = _on_cpu(bias)
    return copies, biases


def _base_name(tree: Tree) -> str | None:
    """What transformers' models and GPT2 note of where their weights are from."""
    name: object = getattr(tree.root, "name_or_path", None)
    return name if isinstance(name, str) and name else None


def _require_usable(factors: Mapping[str, tuple[Tensor, Tensor]], when: str) -> None:
    """Raise where what would be written could not be read again."""
    faults = [
        f"{name} of {path} {reason}"
        for path, pair in factors.items()
        for name, factor in zip("AB", pair, strict=True)
        if (reason := why_not_usable(factor))
    ]
    if faults:
        raise ValueError(f"Not saved{when}: {listed(faults)}.")


def _warn_of_others(tree: Tree) -> None:
    """Say which trainable parameters no adapter has, and so no file."""
    ours = {id(p) for module in tree.adapted.values() for p in module.updates.parameters()}
    others = [
        name
        for name, parameter in tree.root.named_parameters()
        if parameter.requires_grad and id(parameter) not in ours
    ]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        warnings.warn(
            f"Not saved: {cut(', '.join(others[:3]))}{more} require grad, but are in no adapter. "
            "Name their modules in lora.inject(modules_to_save=...), or save them yourself.",
            stacklevel=3,
        )


def _on_cpu(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).cpu().contiguous()


def _pair(update: LowRankUpdate) -> tuple[Tensor, Tensor]:
    a, b = update.factors()
    return _on_cpu(a), _on_cpu(b)
