"""Updates onto a model and off it: inject, eject."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import partial
from typing import cast

import torch
from torch import nn

from lora.config import UpdateConfig
from lora.layer import EmbeddingUpdate, LoRALinear, LowRankUpdate
from lora.layout import out_in_view
from lora.merging import is_merged
from lora.merging import merge as fold
from lora.slices import SlicedUpdate, Slices, spans_of
from lora.targets import (
    Targets,
    base_modules,
    by_pattern,
    find_targets,
    lora_layers,
    named_modules,
    require_layers,
    require_settled,
    shared_weights,
    unwrap,
)


def inject(
    model: nn.Module,
    *,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: Targets = ("c_attn",),
    exclude: Targets = (),
    layers: Iterable[int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    slices: Slices | None = None,
    rslora: bool = False,
    untie: bool = False,
    adapter: str = "default",
    seed: int | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Freeze the model and put a new, trainable low-rank update beside each target layer.

    The new adapter becomes the active one. It leaves the base's outputs as they are until it is
    trained, since it starts at zero.

    Args:
        model: any module that holds `nn.Linear`, Conv1D or `nn.Embedding` layers below it.
        r: rank of every update; at most the smaller side of its layer.
        alpha: scaling numerator; an update counts `alpha / r` times.
        dropout: probability in [0, 1) on the input of the updates, in training mode.
        targets: dotted suffixes of module paths, matched on whole segments; `"c_attn[q,v]"` for
            slices of an output; `"all-linear"` for every linear layer but the output head.
        exclude: suffixes of target layers to leave out.
        layers: numbers of the blocks to adapt, the first number in a path; None for all.
        rank_pattern, alpha_pattern: other ranks and alphas for targets by suffix.
        slices: names of the equal parts of a fused projection, or a mapping from each part's name
            to its outputs, for layers that do not name theirs.
        rslora: scale by `alpha / √r`.
        untie: give a target whose weight is shared, such as a tied head, a weight of its own.
        adapter: the new adapter's name; a model can carry several.
        seed: fixes the adapter, in whatever order layers are found; None draws one from torch's
            global generator.
        dtype: of A and B; by default the base layer's, but float32 beside a 16-bit base.

    Returns:
        The dotted paths of the adapted layers. A module that stands under several paths is
        adapted once, and each of its paths is given.

    Raises:
        ValueError: an argument out of range, a target that matches no layer, a rank too large, a
            name that is taken, a shared weight.
        RuntimeError: the model is merged or routed.
        The model is as it was after any error.
    """
    model = unwrap(model)
    UpdateConfig(r=r, alpha=alpha, dropout=dropout, rslora=rslora)
    found = find_targets(model, targets, exclude, layers)
    if slices is not None and not any(found.values()):
        raise ValueError("slices are given, but no target names any, such as 'c_attn[q,v]'.")
    ranks = by_pattern(rank_pattern, found, r, "rank_pattern")
    alphas = by_pattern(alpha_pattern, found, alpha, "alpha_pattern")
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    modules = base_modules(model)
    updates: dict[str, LowRankUpdate] = {}
    for path, names in found.items():
        config = UpdateConfig(r=ranks[path], alpha=alphas[path], dropout=dropout, rslora=rslora)
        try:
            spans = spans_of(modules[path], names, slices)
            update = make_update(modules[path], config, dtype=dtype, spans=spans)
        except ValueError as error:
            raise ValueError(f"{path}: {error}.") from None
        if not update.A.is_meta:
            update.reset(_generator(seed, path))
        updates[path] = update
    return attach(model, adapter, updates, untie=untie)


def eject(model: nn.Module, *, merge: bool = False) -> list[str]:
    """Take every adapter off the model: each base layer goes back to its place.

    Args:
        model: a model with adapters.
        merge: fold the active updates into the base weights for good first. Without it the model
            is, object for object, the one that was injected.

    Returns:
        The dotted paths of the layers.

    Raises:
        RuntimeError: no adapter here, or the model is merged (unmerge it, or pass `merge=True`).
        ValueError: with `merge=True`, as `lora.merge`.
    """
    layers = require_layers(model)
    if not (merged := is_merged(model)):
        require_settled(layers)
    elif not merge:
        raise RuntimeError("The model is merged. Unmerge it first, or keep it with merge=True.")
    if merge and not merged:
        fold(model)
    for layer in layers.values():
        if layer.merged_weight is not None:
            layer.base.get_parameter("weight").data.copy_(layer.merged_weight)
    paths = list(lora_layers(model, every_path=True))
    detach(model, layers, retie=not merge)
    return paths


def make_update(
    base: nn.Module,
    config: UpdateConfig,
    *,
    dtype: torch.dtype | None = None,
    spans: Mapping[str, tuple[int, int]] | None = None,
    any_rank: bool = False,
) -> LowRankUpdate:
    """A new update that fits `base`, or the given slices of its output; not drawn yet.

    A saved one may have `any_rank`: PEFT's may exceed a layer's side, and so may padded ones.

    Raises:
        ValueError: the rank is above the smaller side of what it adapts, or a dtype of no floats.
    """
    weight = out_in_view(base, base.get_parameter("weight"))
    out_features, in_features = weight.shape
    if not _is_float(dtype):
        raise ValueError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    if dtype is None:
        dtype = weight.dtype if weight.dtype.itemsize > 2 else torch.float32
    smaller = min(
        in_features, out_features, *(stop - start for start, stop in (spans or {}).values())
    )
    if config.r > smaller and not any_rank:
        raise ValueError(f"r {config.r} is above {smaller}, its smaller side; choose less")
    kind = EmbeddingUpdate if isinstance(base, nn.Embedding) else LowRankUpdate
    if spans:
        kind = partial(SlicedUpdate, slices=spans)
    update = kind(in_features, out_features, config, dtype=dtype, device=weight.device)
    return update.train(base.training)


def attach(
    model: nn.Module, adapter: str, updates: Mapping[str, LowRankUpdate], *, untie: bool = False
) -> list[str]:
    """Freeze the model, commit the updates to the layers at their paths, and activate them.

    Raises:
        ValueError: a name that is taken or cannot be one, or listing each layer whose weight is
            shared; nothing is changed.
        RuntimeError: the model is merged, routed or disabled; nothing is changed.
    """
    present = lora_layers(model)
    _check_name(adapter, present)
    require_settled(present)
    if not all(layer.enabled for layer in present.values()):
        raise RuntimeError("The model is disabled. Leave the lora.disabled context first.")
    new = [path for path in updates if path not in present]
    tied = shared_weights(model, new)
    if tied and not untie:
        raise ValueError("; ".join(tied.values()) + ". Pass untie=True to give the target its own.")
    modules = base_modules(model)
    wrappers = {modules[path]: LoRALinear(modules[path]) for path in new}
    own = {p: modules[p].get_parameter("weight").detach().clone() for p in tied}
    thawed = _freeze(model, present)
    _replace(model, wrappers)
    layers = lora_layers(model)
    for path, update in updates.items():
        layers[path].updates[adapter] = update
        layers[path].thawed = thawed
        if path in tied:
            layers[path].untie(nn.Parameter(own[path], requires_grad=False))
            if any(layers[path].tied[-1] is parameter for parameter in thawed):
                thawed.append(layers[path].base.get_parameter("weight"))
    for layer in layers.values():
        layer.activate({adapter: 1.0})
    every = lora_layers(model, every_path=True)
    return [path for path, layer in every.items() if adapter in layer.updates]


def detach(model: nn.Module, layers: Mapping[str, LoRALinear], *, retie: bool = True) -> None:
    """Put the bases of these layers back in their places; after the last one, thaw the base."""
    thawed = [p for layer in layers.values() for p in layer.thawed]
    if retie:
        for layer in layers.values():
            layer.retie()
    _replace(unwrap(model), {layer: layer.base for layer in layers.values()})
    if not lora_layers(model):
        for parameter in thawed:
            parameter.requires_grad_(True)


def _is_float(dtype: object) -> bool:
    return dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)


def _check_name(adapter: str, present: Mapping[str, LoRALinear]) -> None:
    is_text = isinstance(cast(object, adapter), str)
    if not is_text or not adapter or "." in adapter or hasattr(nn.ModuleDict(), adapter):
        raise ValueError(
            f"{adapter!r} cannot name an adapter: it is no text, empty, has a dot, or is taken by "
            "torch.nn.ModuleDict. Choose another."
        )
    names = sorted({name for layer in present.values() for name in layer.updates})
    if adapter in names:
        raise ValueError(
            f"The model carries an adapter {adapter!r} already; here are: "
            f"{', '.join(names)}. Choose another name, or remove or eject it first."
        )


def _freeze(model: nn.Module, present: Mapping[str, LoRALinear]) -> list[nn.Parameter]:
    """Freeze the base; the list of what was trainable is shared by all adapted layers."""
    thawed = next(iter(present.values())).thawed if present else []
    ours = {id(p) for layer in present.values() for p in layer.updates.parameters()}
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in ours:
            parameter.requires_grad_(False)
            thawed.append(parameter)
    return thawed


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put each value of `new` wherever its key stands."""
    for path, module in named_modules(model, every_path=True):
        if module in new:
            parent, _, name = path.rpartition(".")
            model.get_submodule(parent).register_module(name, new[module])


def _generator(seed: int, path: str) -> torch.Generator:
    """A generator of the layer's own, so that the order of injection does not matter."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
