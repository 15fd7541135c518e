"""Adapters onto a model and off it: inject and eject."""

import hashlib
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora import merging
from lora.config import LoRAConfig, UpdateConfig, config_of
from lora.copies import ModuleCopy, copies_of
from lora.layer import Adapted, EmbeddingUpdate, LoRALinear, LowRankUpdate, why_not_usable
from lora.layout import is_hooked, out_in_view, why_not_adaptable
from lora.slices import SlicedUpdate, spans_of
from lora.targets import by_pattern, find_targets
from lora.tree import Tree, listed, refuse, survey, survey_adapted

Spans = Mapping[str, tuple[int, int]]
HEADS = ("classifier", "score", "qa_outputs")  # heads that a task draws anew


def inject(
    model: nn.Module,
    config: LoRAConfig | None = None,
    *,
    adapter: str = "default",
    **settings: Any,
) -> list[str]:
    """Freeze the model and put a new, trainable low-rank update beside each target layer.

    The new adapter becomes the active one; it starts at zero, as the base.

    Args:
        model: any module that holds `nn.Linear`, Conv1D or `nn.Embedding` layers below it.
        config: what the adapter is made of; or its fields as keywords.
        adapter: the new adapter's name; a model can carry several.
        settings: fields of `lora.LoRAConfig`.

    Returns:
        The dotted paths of the adapted layers, of a shared one each.

    Raises:
        TypeError: a keyword that is no field of `lora.LoRAConfig`.
        ValueError: an argument out of range, no such layer, a taken name, a shared weight.
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
        merge: fold the active updates into the base weights first, for good.

    Returns:
        The dotted paths of the layers.

    Raises:
        RuntimeError: no adapter here, or the model is merged and `merge` is false.
        ValueError: with `merge`, as `lora.merge`.
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
            spans = spans_of(base, names, config.slices)
            require_rank(base, r, spans)
            one = UpdateConfig(
                r=r, alpha=alphas[path], dropout=config.dropout, rslora=config.rslora
            ).stacked(max(1, len(spans)))
            updates[path] = update = _zero_update(base, one, spans, config.dtype)
            update.reset(generator(seed, path))
        except ValueError as error:
            faults.append(f"{path}: {str(error).removesuffix('.')}")
    refuse(faults)
    return updates | copies_of(tree, config.modules_to_save, updates)


def build(
    base: nn.Module,
    config: UpdateConfig,
    a: Tensor,
    b: Tensor,
    *,
    spans: Spans | None = None,
    dtype: torch.dtype | None = None,
) -> LowRankUpdate:
    """An update of `base`, or of slices of its output, with factors `(r, in)` and `(out, r)`."""
    if reason := why_not_adaptable(base):
        raise ValueError(reason)
    update = _zero_update(base, config, spans, dtype)
    faults: list[str] = []
    for name, value, factor in zip("AB", (a, b), update.factors(), strict=True):
        if value.shape != factor.shape:
            faults.append(f"lora_{name} is {(*value.shape,)}, this layer takes {(*factor.shape,)}")
        elif reason := why_not_usable(value, factor.dtype):
            faults.append(f"lora_{name} {reason}")
    refuse(faults, "{}")
    update.set_factors(a, b)
    return update


def require_rank(base: nn.Module, r: int, spans: Spans | None = None) -> None:
    """Raise a ValueError where a rank is above the smaller side of what it adapts."""
    sides = [stop - start for start, stop in (spans or {}).values()]
    smaller = min(*base.get_parameter("weight").shape, *sides)
    if r > smaller:
        raise ValueError(f"r {r} is above {smaller}, its smaller side; leave it out (exclude=)")


def attach(tree: Tree, adapter: str, updates: Mapping[str, nn.Module]) -> list[str]:
    """Freeze the model, put updates and copies beside their modules, and activate them."""
    if adapter in tree.adapters:
        raise ValueError(f"The model carries an adapter {adapter!r} already; {tree.named()}.")
    if not adapter or "." in adapter or hasattr(nn.ModuleDict(), adapter):
        raise ValueError(f"{adapter!r} cannot name an adapter.")
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
    layers = [path for path, module in new.items() if isinstance(module, LoRALinear)]
    untie = "layer.weight = torch.nn.Parameter(layer.weight.detach().clone())"
    refuse(tree.shared_weights(layers), f"{{}} are one tensor. Use exclude=, or untie: {untie}.")
    if shared := tree.shared_weights(path for path in new if path not in layers):
        warnings.warn(f"{listed(shared)} are one tensor, of which a copy is trained.", stacklevel=3)
    if "frozen_by_lora" not in vars(tree.root):
        updated = {p for a in tree.adapted.values() for p in a.updates.parameters()}
        named = tree.root.named_parameters(remove_duplicate=False)
        frozen = {name: p for name, p in named if p.requires_grad and p not in updated}
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
    """A generator for one layer, so that the order of layers does not matter."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def _zero_update(
    base: nn.Module, config: UpdateConfig, spans: Spans | None, dtype: torch.dtype | None
) -> LowRankUpdate:
    """An update that fits `base`, or slices of its output, not drawn yet."""
    weight = out_in_view(base, base.get_parameter("weight"))
    device = weight.device
    if is_hooked(base):
        if spans:
            raise ValueError("a hook moves its weight, so that no slices can be adapted")
        if weight.is_meta:  # until the hook loads it
            device = getattr(getattr(base, "_hf_hook", None), "execution_device", None) or "cpu"
    dtype = dtype or (weight.dtype if weight.dtype.itemsize > 2 else torch.float32)
    if not config.scaling <= torch.finfo(dtype).max:
        raise ValueError(f"its scaling {config.scaling:.3g} is more than {dtype} holds")
    n_out, n_in = weight.shape
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    if isinstance(base, nn.Embedding):
        update = EmbeddingUpdate(n_in, n_out, config, **options)
        update.padding_idx = base.padding_idx
    elif spans:
        update = SlicedUpdate(n_in, n_out, config, slices=spans, **options)
    else:
        update = LowRankUpdate(n_in, n_out, config, **options)
    return update.train(base.training)


def _warn_of_the_base_alone(*_: object) -> None:
    if sys._getframe(2).f_code.co_name == "save_pretrained":
        warnings.warn(
            "save_pretrained writes the base. Write the adapter with lora.save.", stacklevel=4
        )
