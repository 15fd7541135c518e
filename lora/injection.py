"""Adapters onto a model and off it: inject and eject; build and attach, which loading uses too."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Unpack, cast

import torch
from torch import Tensor, nn

from lora.adapted import Adapted, Origin
from lora.config import LoRAConfig, LoRASettings, UpdateConfig, config_of, is_float, short
from lora.layer import EmbeddingUpdate, LoRALinear, LowRankUpdate
from lora.layout import out_in_view
from lora.merging import fold, keep_folded
from lora.slices import SlicedUpdate, spans_of
from lora.targets import by_pattern, find_targets
from lora.tree import Tree, all_or_nothing, survey, survey_adapted

Spans = Mapping[str, tuple[int, int]]


def inject(
    model: nn.Module,
    config: LoRAConfig | None = None,
    *,
    adapter: str = "default",
    untie: bool = False,
    **settings: Unpack[LoRASettings],
) -> list[str]:
    """Freeze the model and put a new, trainable low-rank update beside each target layer.

    The new adapter becomes the active one. It leaves the base's outputs as they are until it is
    trained, since it starts at zero.

    Args:
        model: any module that holds `nn.Linear`, Conv1D or `nn.Embedding` layers below it.
        config: what the adapter is made of; or its fields as keywords, as in
            `inject(model, r=8, alpha=16)`. See `lora.LoRAConfig` for them and their defaults.
        adapter: the new adapter's name; a model can carry several.
        untie: give a target whose weight is shared, such as a tied head, a weight of its own.
        settings: the fields of `lora.LoRAConfig`.

    Returns:
        The dotted paths of the adapted layers. A module that stands under several paths is
        adapted once, and each of its paths is given.

    Raises:
        TypeError: a keyword that is no field of `lora.LoRAConfig`.
        ValueError: an argument out of range, a target that matches no layer, a rank too large, a
            name that is taken, a shared weight.
        RuntimeError: the model is merged or routed.
        The model is as it was after any error, Ctrl-C included.
    """
    config = config_of(config, settings)
    tree = survey(model)
    return attach(tree, adapter, _drawn_updates(tree, config), untie=untie)


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
        The model is as it was after any error, Ctrl-C included.
    """
    tree = survey_adapted(model)
    if not tree.is_merged:
        tree.require_settled()
    elif not merge:
        raise RuntimeError("The model is merged. Unmerge it first, or keep it with merge=True.")
    with all_or_nothing(tree.root.modules()):
        if merge:
            if not tree.is_merged:
                fold(tree)
            keep_folded(tree)
        detach(tree, tree.adapted, retie=not merge)
    return tree.paths(tree.adapted.values())


def build(
    base: nn.Module,
    config: UpdateConfig,
    a: Tensor,
    b: Tensor,
    *,
    spans: Spans | None = None,
    dtype: torch.dtype | None = None,
) -> LowRankUpdate:
    """An update of `base` with these factors; nothing is allocated before their shapes fit.

    Args:
        base: the layer that it is for.
        config: what describes the factors.
        a, b: `(r, in)` and `(out, r)`.
        spans: `(start, stop)` of each slice of the output that it adapts, by name; None for all.
        dtype: of A and B; by default as `lora.inject` chooses it.

    Raises:
        ValueError: listing what does not fit.
    """
    if not is_float(dtype):
        raise ValueError(f"dtype must be a floating-point torch.dtype, got {short(dtype)}")
    out_features, in_features = out_in_view(base, base.get_parameter("weight")).shape
    wanted = {"A": (config.r, in_features), "B": (out_features, config.r)}
    if faults := [
        f"lora_{name} is {tuple(given.shape)}, this layer takes {wanted[name]}"
        for name, given in (("A", a), ("B", b))
        if tuple(given.shape) != wanted[name]
    ]:
        raise ValueError(", ".join(faults))
    update = _empty_update(base, config, spans, dtype)
    update.set_factors(a, b)
    return update


def attach(
    tree: Tree, adapter: str, updates: Mapping[str, LowRankUpdate], *, untie: bool = False
) -> list[str]:
    """Freeze the model, commit the updates to the layers at their paths, and activate them.

    Returns:
        Every path of the layers.

    Raises:
        ValueError: a name that is taken or cannot be one, or listing each layer whose weight is
            shared.
        RuntimeError: the model is merged, routed or disabled.
        Nothing is changed then.
    """
    _check_name(adapter, tree)
    tree.require_settled()
    if not all(module.enabled for module in tree.adapted.values()):
        raise RuntimeError("The model is disabled. Leave the lora.disabled context first.")
    new = [path for path in updates if path not in tree.adapted]
    tied = tree.shared_weights(new)
    if tied and not untie:
        raise ValueError(f"{shared_message(tied)}. Pass untie=True to give the target its own.")
    adapted = {path: tree.adapted.get(path) or LoRALinear(tree.bases[path]) for path in updates}
    own = {p: tree.bases[p].get_parameter("weight").detach().clone() for p in tied}
    with all_or_nothing(tree.root.modules()):
        origin = _freeze(tree, tied)
        for path, weight in own.items():
            tree.bases[path].weight = nn.Parameter(weight, requires_grad=False)
        tree.replace({tree.bases[path]: adapted[path] for path in new})
        for path, update in updates.items():
            adapted[path].updates[adapter] = update
        for module in {**tree.adapted, **adapted}.values():
            module.origin = origin
            module.activate({adapter: 1.0})
    return tree.paths([adapted[p] if p in tree.adapted else tree.bases[p] for p in updates])


def detach(tree: Tree, which: Mapping[str, Adapted], *, retie: bool = True) -> None:
    """Put the bases of these modules back in their places; after the last one, thaw the base."""
    modules = list(which.values())
    bases = {id(module.base) for module in modules}
    origin = modules[0].origin if modules else Origin()
    if retie:
        for base, owner, name in origin.tied:
            if id(base) in bases:
                base.weight = owner.get_parameter(name)
    if "" in which:
        raise RuntimeError("The model is itself an adapted layer: its base is model.base.")
    tree.replace({module: module.base for module in modules})
    if len(modules) == len(tree.adapted):
        for module, name in origin.thawed:
            parameter = dict(module.named_parameters(recurse=False)).get(name)
            if parameter is not None:
                parameter.requires_grad_(True)


def shared_message(shared: Mapping[str, list[tuple[str, nn.Module, str]]]) -> str:
    """What a message says of layers whose weight others have too."""
    return "; ".join(
        f"{path}.weight is shared: {' and '.join(name for name, *_ in owners)} are one tensor"
        for path, owners in shared.items()
    )


def require_rank(base: nn.Module, r: int, spans: Spans | None = None) -> None:
    """Raise a ValueError where a rank is above the smaller side of what it adapts."""
    sides = [stop - start for start, stop in (spans or {}).values()]
    smaller = min(*base.get_parameter("weight").shape, *sides)
    if r > smaller:
        raise ValueError(
            f"r {r} is above {smaller}, its smaller side; choose less, or leave it out (exclude=)"
        )


def _drawn_updates(tree: Tree, config: LoRAConfig) -> dict[str, LowRankUpdate]:
    """The new updates that a config asks for, by path."""
    found = find_targets(tree, config)
    if config.slices is not None and not any(found.values()):
        raise ValueError("slices are given, but no target names any, such as 'c_attn[q,v]'.")
    ranks = by_pattern(config.rank_pattern, found, config.r, "rank_pattern")
    alphas = by_pattern(config.alpha_pattern, found, config.alpha, "alpha_pattern")
    seed = int(torch.randint(2**63 - 1, (), device="cpu")) if config.seed is None else config.seed
    updates: dict[str, LowRankUpdate] = {}
    faults: list[str] = []
    for path, names in found.items():
        base = tree.bases[path]
        try:
            spans = spans_of(base, names, config.slices)
            one = UpdateConfig(
                r=ranks[path], alpha=alphas[path], dropout=config.dropout, rslora=config.rslora
            )
            require_rank(base, one.r, spans)
            update = _empty_update(base, one.stacked(max(1, len(spans))), spans, config.dtype)
        except ValueError as error:
            faults.append(f"{path}: {str(error).removesuffix('.')}")
            continue
        if not update.A.is_meta:
            update.reset(generator(seed, path))
        updates[path] = update
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError("; ".join(faults[:5]) + more + ".")
    return updates


def _empty_update(
    base: nn.Module, config: UpdateConfig, spans: Spans | None, dtype: torch.dtype | None
) -> LowRankUpdate:
    """An update that fits `base`, or the given slices of its output; its A is not drawn yet."""
    weight = out_in_view(base, base.get_parameter("weight"))
    if dtype is None:
        dtype = weight.dtype if weight.dtype.itemsize > 2 else torch.float32
    if not config.scaling <= torch.finfo(dtype).max:
        raise ValueError(f"its scaling {config.scaling:.3g} is more than {dtype} holds")
    out_features, in_features = weight.shape
    if isinstance(base, nn.Embedding):
        kind = partial(EmbeddingUpdate, padding_idx=base.padding_idx)
    elif spans:
        kind = partial(SlicedUpdate, slices=spans)
    else:
        kind = LowRankUpdate
    update = kind(in_features, out_features, config, dtype=dtype, device=weight.device)
    return update.train(base.training)


def _check_name(adapter: str, tree: Tree) -> None:
    is_text = isinstance(cast(object, adapter), str)
    if not is_text or not adapter or "." in adapter or hasattr(nn.ModuleDict(), adapter):
        raise ValueError(
            f"{str(adapter)[:80]!r} cannot name an adapter: it is no text, empty, has a dot, or is "
            "taken by torch.nn.ModuleDict. Choose another."
        )
    if adapter in tree.adapters:
        raise ValueError(
            f"The model carries an adapter {adapter!r} already; {tree.named()}. "
            "Choose another name, or remove or eject it first."
        )


def _freeze(tree: Tree, tied: Mapping[str, list[tuple[str, nn.Module, str]]]) -> Origin:
    """Freeze the base, and say what `eject` is to put back."""
    before = next((module.origin for module in tree.adapted.values()), Origin())
    ours = {m for adapted in tree.adapted.values() for m in adapted.updates.modules()}
    trainable = [
        (module, name, parameter)
        for module in tree.root.modules()
        if module not in ours
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and not parameter.is_inference()  # that can never train
    ]
    for _, _, parameter in trainable:
        parameter.requires_grad_(False)
    thawed = before.thawed + tuple((module, name) for module, name, _ in trainable)
    others = tuple(
        (tree.bases[path], *next(o[1:] for o in owners if o[1] is not tree.bases[path]))
        for path, owners in tied.items()
    )
    return Origin(thawed, before.tied + others)


def generator(seed: int, path: str) -> torch.Generator:
    """A generator of the layer's own, so that the order of layers does not matter."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
