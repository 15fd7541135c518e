"""Adapters onto a model and off it: inject and eject; attach and detach, on which others stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack, cast

from torch import nn

from lora.adapted import Adapted, Origin
from lora.building import draw
from lora.config import LoRAConfig
from lora.copies import ModuleCopy
from lora.layer import LoRALinear
from lora.merging import fold, keep_folded
from lora.settings import LoRASettings, config_of
from lora.tree import Owner, Tree, survey, survey_adapted
from lora.undo import all_or_nothing
from lora.updates import LowRankUpdate


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
        settings: r, alpha, dropout, targets, exclude, layers, rank_pattern, alpha_pattern, slices,
            rslora, modules_to_save, bias, seed, dtype; see `lora.LoRAConfig`.

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
    tree.require_whole()
    return attach(tree, adapter, draw(tree, config), untie=untie)


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
    if type(merge) is not bool:
        raise ValueError(f"merge must be True or False, got {merge!r:.80}.")
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


def attach(
    tree: Tree, adapter: str, updates: Mapping[str, nn.Module], *, untie: bool = False
) -> list[str]:
    """Freeze the model, commit the updates to the layers at their paths, and activate them.

    What is no `LowRankUpdate` is a copy of the module at its path.

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
    if type(untie) is not bool:
        raise ValueError(f"untie must be True or False, got {untie!r:.80}.")
    wrapped = {path: _wrapped(tree, path, update) for path, update in updates.items()}
    new = [path for path in updates if path not in tree.adapted]
    tied = tree.shared_weights(p for p in new if isinstance(wrapped[p], LoRALinear))
    if tied and not untie:
        raise ValueError(f"{_shared(tied)}. Pass untie=True to give the target its own.")
    own = {path: tree.bases[path].get_parameter("weight").detach().clone() for path in tied}
    with all_or_nothing(tree.root.modules()):
        origin = _freeze(tree, tied)
        for path, weight in own.items():
            tree.bases[path].weight = nn.Parameter(weight, requires_grad=False)
        tree.replace({tree.bases[path]: wrapped[path] for path in new})
        for path, update in updates.items():
            wrapped[path].updates[adapter] = update
        for module in {**tree.adapted, **wrapped}.values():
            module.origin = origin
            module.activate({adapter: 1.0})
    return tree.paths([wrapped[p] if p in tree.adapted else tree.bases[p] for p in updates])


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


def _shared(owners: Mapping[str, list[Owner]]) -> str:
    """What a message says of layers whose weight others have too."""
    return "; ".join(
        f"{path}.weight is shared: {' and '.join(o.path for o in having)} are one tensor"
        for path, having in owners.items()
    )


def _wrapped(tree: Tree, path: str, update: nn.Module) -> Adapted:
    """The adapted module at a path that takes this update: the one that is there, or a new one."""
    kind = LoRALinear if isinstance(update, LowRankUpdate) else ModuleCopy
    present = tree.adapted.get(path)
    if present is not None and not isinstance(present, kind):
        raise ValueError(f"{path} carries another kind of update: low-rank, or a whole copy.")
    return present or kind(tree.bases[path])


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


def _freeze(tree: Tree, tied: Mapping[str, list[Owner]]) -> Origin:
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
        (tree.bases[path], *next(o[1:] for o in owners if o.module is not tree.bases[path]))
        for path, owners in tied.items()
    )
    return Origin(thawed, before.tied + others)
