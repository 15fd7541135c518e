"""The updates of an adapter, before they are on a model: drawn anew, or built from factors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from lora.config import LoRAConfig, UpdateConfig, as_names, is_float
from lora.copies import bias_copy, own_bias, whole_copy
from lora.layout import out_in_view
from lora.messages import brief, listed
from lora.slices import SlicedUpdate, spans_of
from lora.targets import by_pattern, find_targets, fits
from lora.tree import Tree
from lora.updates import EmbeddingUpdate, LowRankUpdate

Spans = Mapping[str, tuple[int, int]]


def draw(tree: Tree, config: LoRAConfig) -> dict[str, nn.Module]:
    """All that a config asks for, by path: new updates, and copies of modules.

    Raises:
        ValueError: listing what does not fit the model.
    """
    updates = _drawn(tree, config)
    if config.bias != "none":
        for path, update in updates.items():
            update.bias = own_bias(tree.bases[path])
    return {**updates, **_copies(tree, config, set(updates))}


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
        raise ValueError(f"dtype must be a floating-point torch.dtype, got {brief(dtype)}")
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


def require_rank(base: nn.Module, r: int, spans: Spans | None = None) -> None:
    """Raise a ValueError where a rank is above the smaller side of what it adapts."""
    sides = [stop - start for start, stop in (spans or {}).values()]
    smaller = min(*base.get_parameter("weight").shape, *sides)
    if r > smaller:
        raise ValueError(
            f"r {r} is above {smaller}, its smaller side; choose less, or leave it out (exclude=)"
        )


def _drawn(tree: Tree, config: LoRAConfig) -> dict[str, LowRankUpdate]:
    """The new updates that a config asks for, by path."""
    if not config.targets:
        return {}
    found = find_targets(tree, config)
    if config.slices is not None and not any(found.values()):
        raise ValueError("slices are given, but no target names any, such as 'c_attn[q,v]'.")
    ranks = by_pattern(config.rank_pattern, found, config.r, "rank_pattern")
    alphas = by_pattern(config.alpha_pattern, found, config.alpha, "alpha_pattern")
    seed = int(torch.randint(2**63 - 1, (), device="cpu")) if config.seed is None else config.seed
    updates: dict[str, LowRankUpdate] = {}
    faults: dict[str, list[str]] = {}  # the layers of which each is true
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
            faults.setdefault(str(error).removesuffix("."), []).append(path)
            continue
        if not update.A.is_meta:
            update.reset(generator(seed, path))
        updates[path] = update
    if faults:
        raise ValueError(f"{listed(_grouped(faults))}.")
    return updates


def _grouped(faults: Mapping[str, list[str]]) -> list[str]:
    """Each fault once, behind the first layers that have it."""
    return [
        f"{', '.join(paths[:2])}{f' and {len(paths) - 2} more' if len(paths) > 2 else ''}: {fault}"
        for fault, paths in faults.items()
    ]


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


def _copies(tree: Tree, config: LoRAConfig, adapted: set[str]) -> dict[str, nn.Module]:
    """Whole copies of the modules to save and, if all biases train, copies of those elsewhere."""
    whole: list[str] = []
    for name in as_names(config.modules_to_save):
        found = [path for path in tree.bases if path and fits(path, name)]
        if not found:
            raise ValueError(f"No module matches modules_to_save {name!r}.")
        whole += found
    inside = tuple(f"{path}." for path in (*whole, *tree.copies))
    if clash := [p for p in adapted if p in whole or p.startswith(inside)]:
        raise ValueError(f"{clash[0]} is a target and in modules_to_save. Leave it out of one.")
    copies = {path: whole_copy(tree.bases[path]) for path in whole if not path.startswith(inside)}
    if config.bias == "all":
        for path, module in tree.bases.items():
            free = path not in adapted | {*copies, *tree.layers} and not path.startswith(inside)
            if path and free and own_bias(module) is not None:
                copies[path] = bias_copy(module)
    return copies


def generator(seed: int, path: str) -> torch.Generator:
    """A generator of the layer's own, so that the order of layers does not matter."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
