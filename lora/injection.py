"""Adapters onto a model and off it: inject and eject."""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora import merging
from lora.config import LoRAConfig, UpdateConfig
from lora.copies import ModuleCopy, whole_copy
from lora.layer import Adapted, EmbeddingUpdate, LoRALinear, LowRankUpdate, why_not_usable
from lora.layout import is_hooked, out_in_view, why_not_adaptable
from lora.slices import SlicedUpdate, spans_of
from lora.targets import by_pattern, find_targets, fits
from lora.tree import Tree, listed, survey, survey_adapted

Spans = Mapping[str, tuple[int, int]]
HEADS = ("classifier", "score", "qa_outputs")
"""What transformers calls heads that a task draws anew, and PEFT saves because of `task_type`."""


def inject(
    model: nn.Module,
    config: LoRAConfig | None = None,
    *,
    adapter: str = "default",
    **settings: Any,
) -> list[str]:
    """Freeze the model and put a new, trainable low-rank update beside each target layer.

    The new adapter becomes the active one. It leaves the base's outputs as they are until it is
    trained, since it starts at zero. The first one freezes the model's parameters.

    Args:
        model: any module that holds `nn.Linear`, Conv1D or `nn.Embedding` layers below it.
        config: what the adapter is made of; or its fields as keywords, as in
            `inject(model, r=8, alpha=16)`.
        adapter: the new adapter's name; a model can carry several.
        settings: fields of `lora.LoRAConfig`.

    Returns:
        The dotted paths of the adapted layers; of a module with several paths, each of them.

    Raises:
        TypeError: a keyword that is no field of `lora.LoRAConfig`.
        ValueError: an argument out of range, a target that matches no layer, a rank too large, a
            name that is taken, a shared weight.
        RuntimeError: the model is merged, routed, sharded, or wrapped in DDP.
    """
    if str(settings.get("task_type")).endswith(("_CLS", "QUESTION_ANS")):
        heads = [name for name in HEADS if hasattr(model, name)] or ["the head's name"]
        raise TypeError(f"Instead of 'task_type' pass modules_to_save={tuple(heads)}.")
    config, tree = config_of(config, settings), survey(model)
    return attach(tree, adapter, draw(tree, config))


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
    tree = survey_adapted(model)
    if merge:
        if not tree.is_merged:
            merging.merge(model)
        merging.keep_folded(tree)
    else:
        tree.require_settled()
    detach(tree, tree.adapted)
    return tree.paths(tree.adapted)


def config_of(
    config: LoRAConfig | None, settings: Mapping[str, Any], default: LoRAConfig | None = None
) -> LoRAConfig:
    """The config given as one, or as keywords that replace fields of a default."""
    if config is None:
        defaults = {} if default is None else {**vars(default), "seed": None}
        return LoRAConfig(**{**defaults, **settings})
    if not isinstance(config, LoRAConfig):
        raise TypeError(
            f"config must be a lora.LoRAConfig, got {type(config).__name__}. Of another library's "
            "config pass the values: lora.inject(model, r=…, alpha=…, targets=…)."
        )
    if settings:
        raise TypeError(
            f"Give a config or {', '.join(settings)}, not both; see dataclasses.replace."
        )
    return config


def draw(tree: Tree, config: LoRAConfig) -> dict[str, nn.Module]:
    """All that a config asks for, by path: new updates, and copies of modules."""
    layers = find_targets(tree, config) if config.targets else {}
    if config.slices is not None and not any(layers.values()):
        raise ValueError("slices are given, but no target names any, such as 'c_attn[q,v]'.")
    ranks = by_pattern(config.rank_pattern, layers, config.r, "rank_pattern")
    alphas = by_pattern(config.alpha_pattern, layers, config.alpha, "alpha_pattern")
    seed = int(torch.randint(2**63 - 1, (), device="cpu")) if config.seed is None else config.seed
    updates: dict[str, nn.Module] = {}
    faults: list[str] = []
    for path, names in layers.items():
        base, r = tree.bases[path], ranks[path]
        try:
            one = UpdateConfig(
                r=r, alpha=alphas[path], dropout=config.dropout, rslora=config.rslora
            )
            spans = spans_of(base, names, config.slices)
            require_rank(base, r, spans)
            update = _zero_update(base, one.stacked(max(1, len(spans))), spans, config.dtype)
        except ValueError as error:
            faults.append(f"{path}: {str(error).removesuffix('.')}")
        else:
            update.reset(generator(seed, path))
            updates[path] = update
    if faults:
        raise ValueError(f"{listed(faults)}.")
    return updates | _copies(tree, config, updates)


def build(
    base: nn.Module,
    config: UpdateConfig,
    a: Tensor,
    b: Tensor,
    *,
    spans: Spans | None = None,
    dtype: torch.dtype | None = None,
) -> LowRankUpdate:
    """An update of `base` with the factors `a` `(r, in)` and `b` `(out, r)`.

    `spans` are the slices of the output that it adapts, by name; None stands for all of it.
    """
    if reason := why_not_adaptable(base):
        raise ValueError(reason)
    update = _zero_update(base, config, spans, dtype)
    faults: list[str] = []
    for name, value, factor in zip("AB", (a, b), update.factors(), strict=True):
        if value.shape != factor.shape:
            shapes = f"{tuple(value.shape)}, this layer takes {tuple(factor.shape)}"
            faults.append(f"lora_{name} is {shapes}")
        elif reason := why_not_usable(value, factor.dtype):
            faults.append(f"lora_{name} {reason}")
    if faults:
        raise ValueError(", ".join(faults))
    update.set_factors(a, b)
    return update


def require_rank(base: nn.Module, r: int, spans: Spans | None = None) -> None:
    """Raise a ValueError where a rank is above the smaller side of what it adapts."""
    sides = [stop - start for start, stop in (spans or {}).values()]
    smaller = min(*base.get_parameter("weight").shape, *sides)
    if r > smaller:
        raise ValueError(
            f"r {r} is above {smaller}, its smaller side; choose less, or leave it out (exclude=)"
        )


def attach(tree: Tree, adapter: str, updates: Mapping[str, nn.Module]) -> list[str]:
    """Freeze the model, commit the updates to the modules at their paths, and activate them.

    Anything but a `LowRankUpdate` is a copy of the module at its path. Returns all their paths.
    """
    if adapter in tree.adapters:
        raise ValueError(
            f"The model carries an adapter {adapter!r} already; {tree.named()}. "
            "Choose another name, or remove or eject it first."
        )
    if not adapter or "." in adapter or hasattr(nn.ModuleDict(), adapter):
        raise ValueError(f"{adapter!r} cannot name an adapter, as it cannot name a module.")
    tree.require_settled()
    tree.refuse_ddp()
    if not all(module.enabled for module in tree.adapted.values()):
        raise RuntimeError("The model is disabled. Leave the lora.disabled context first.")
    new: dict[str, Adapted] = {}
    for path, update in updates.items():
        wrapper = LoRALinear if isinstance(update, LowRankUpdate) else ModuleCopy
        if path not in tree.adapted:
            try:
                new[path] = wrapper(tree.bases[path])
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error.__cause__
        elif not isinstance(tree.adapted[path], wrapper):
            raise ValueError(f"{path} carries another kind of update: low-rank, or a whole copy.")
    layers = [path for path, module in new.items() if isinstance(module, LoRALinear)]
    if shared := tree.shared_weights(layers):
        raise ValueError(
            f"{listed(shared)} are one tensor. Leave the layer out (exclude=), or give it one of "
            "its own: layer.weight = torch.nn.Parameter(layer.weight.detach().clone())."
        )
    if shared := tree.shared_weights(path for path in new if path not in layers):
        warnings.warn(f"{listed(shared)} are one tensor, of which a copy is trained.", stacklevel=3)
    if "frozen_by_lora" not in vars(tree.root):
        updated = {p for a in tree.adapted.values() for p in a.updates.parameters()}
        frozen = {
            name: parameter
            for name, parameter in tree.root.named_parameters(remove_duplicate=False)
            if parameter.requires_grad and parameter not in updated
        }
        hook = tree.root.register_state_dict_post_hook(_warn_of_the_base_alone)
        vars(tree.root)["frozen_by_lora"] = tuple(frozen), hook  # for `detach`
        for parameter in frozen.values():
            parameter.requires_grad_(False)
    tree.replace(new)
    adapted = tree.adapted | new
    for path, update in updates.items():
        adapted[path].updates[adapter] = update
    for module in adapted.values():
        module.activate({adapter: 1.0})
        module.train_only([adapter])
    return tree.paths(updates)


def detach(tree: Tree, which: Mapping[str, Adapted]) -> None:
    """Put the bases of these modules back; after the last one, thaw the model."""
    if "" in which:
        raise RuntimeError("The model is itself an adapted layer: its base is model.base.")
    tree.replace({path: module.base for path, module in which.items()})
    if len(which) < len(tree.adapted):
        return
    for module in tree.root.modules():
        if frozen := vars(module).pop("frozen_by_lora", None):
            names, hook = frozen
            hook.remove()
            for name, parameter in module.named_parameters(remove_duplicate=False):
                if name in names:
                    parameter.requires_grad_(True)


def generator(seed: int, path: str) -> torch.Generator:
    """A generator of the layer's own, so that the order of layers does not matter."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def _zero_update(
    base: nn.Module, config: UpdateConfig, spans: Spans | None, dtype: torch.dtype | None
) -> LowRankUpdate:
    """An update that fits `base`, or the given slices of its output; its A is not drawn yet."""
    weight = out_in_view(base, base.get_parameter("weight"))
    device = weight.device
    if is_hooked(base):
        if spans:
            raise ValueError("its weight is moved by a hook, and its slices cannot be adapted")
        if weight.is_meta:  # until the hook loads it
            device = getattr(getattr(base, "_hf_hook", None), "execution_device", None) or "cpu"
    if dtype is None:
        dtype = weight.dtype if weight.dtype.itemsize > 2 else torch.float32
    if not config.scaling <= torch.finfo(dtype).max:
        raise ValueError(f"its scaling {config.scaling:.3g} is more than {dtype} holds")
    n_out, n_in = weight.shape
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    if isinstance(base, nn.Embedding):
        update = EmbeddingUpdate(n_in, n_out, config, padding_idx=base.padding_idx, **options)
    elif spans:
        update = SlicedUpdate(n_in, n_out, config, slices=spans, **options)
    else:
        update = LowRankUpdate(n_in, n_out, config, **options)
    return update.train(base.training)


def _copies(tree: Tree, config: LoRAConfig, adapted: Collection[str]) -> dict[str, nn.Module]:
    """Copies of the modules to save."""
    whole: list[str] = []
    for name in config.modules_to_save:
        paths = [path for path in tree.bases if path and fits(path, name)]
        if not paths:
            raise ValueError(f"No module matches modules_to_save {name!r}.")
        whole += paths
    for path in whole:
        if type(tree.bases[path]).forward is nn.Module.forward:
            raise ValueError(f"{path} in modules_to_save has no forward: name what it holds.")
    inside = tuple(f"{path}." for path in (*whole, *tree.copies))
    if clash := [p for p in adapted if p in whole or p.startswith(inside)]:
        raise ValueError(
            f"{clash[0]} is a target and in modules_to_save. Leave it out of one (exclude=)."
        )
    return {path: whole_copy(tree.bases[path]) for path in whole if not path.startswith(inside)}


def _warn_of_the_base_alone(*_: object) -> None:
    """After `state_dict` of the model: where transformers asks for it, to write it."""
    if sys._getframe(2).f_code.co_name == "save_pretrained":
        warnings.warn(
            "save_pretrained writes the base. Write the adapter with lora.save.", stacklevel=4
        )
