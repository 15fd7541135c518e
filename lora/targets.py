"""Which layers a target names; `LoRAConfig` has its forms."""

import re
import warnings
from collections.abc import Collection, Mapping
from typing import TypeVar

from torch import nn

from lora.config import LoRAConfig, as_names, as_numbers
from lora.layout import why_not_adaptable
from lora.slices import split_target
from lora.tree import Tree, listed, refuse

T = TypeVar("T")
ALL_LINEAR = "all-linear"


def find_targets(tree: Tree, config: LoRAConfig) -> dict[str, tuple[str, ...]]:
    """The base layers that the config's targets name, by first path, each with its slices."""
    layers, faults = _matches(tree, as_names(config.targets))
    for name in as_names(config.exclude):
        excluded = [path for path in layers if fits(path, name)]
        if not excluded:
            faults.append(f"exclude={name!r} matches no target.")
        layers = {path: slices for path, slices in layers.items() if path not in excluded}
    if config.layers is not None:
        wanted, present = {*as_numbers(config.layers)}, {_block(path) for path in layers}
        if missing := sorted(wanted - present):
            blocks = sorted(number for number in present if number is not None)
            faults.append(f"layers={missing} match no target; there are {blocks}.")
        layers = {path: slices for path, slices in layers.items() if _block(path) in wanted}
    if not layers and not faults:
        faults.append("Nothing is left of the targets." if _linear(tree) else _hint(tree))
    refuse(faults, "{}")
    return {path: layers[path] for path in tree.bases if path in layers}


def fits(path: str, entry: str) -> bool:
    """Whether a suffix fits the path on whole segments, or a regular expression all of it."""
    if not is_regex(entry):
        return f".{path}".endswith(f".{entry}")
    try:
        return re.fullmatch(entry, path) is not None
    except re.error as error:
        raise ValueError(f"{entry!r} is no regular expression: {error}.") from None


def is_regex(entry: str) -> bool:
    return any(character in entry for character in "*+?()|^$\\")


def by_pattern(
    pattern: Mapping[str, T] | None, paths: Collection[str], default: T, name: str
) -> dict[str, T]:
    """By path the value of the first entry in `pattern` that fits, or the default."""
    pattern = pattern or {}
    if idle := [entry for entry in pattern if not any(fits(path, entry) for path in paths)]:
        raise ValueError(f"{name} names {', '.join(idle)}, which match no target.")
    return {
        path: next((value for entry, value in pattern.items() if fits(path, entry)), default)
        for path in paths
    }


def _matches(tree: Tree, targets: tuple[str, ...]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    layers: dict[str, tuple[str, ...]] = {}
    faults: list[str] = []
    missing: list[str] = []
    for target in targets:
        name, slices = (target, ()) if is_regex(target) else split_target(target)
        matches = [path for path in tree.bases if path and fits(path, name)]
        if target == ALL_LINEAR:
            matches = _all_linear(tree)
        unfit = [path for path in matches if why_not_adaptable(tree.bases[path])]
        if is_regex(target):  # that reaches blocks too means the layers
            matches = [path for path in matches if path not in unfit] or matches
            unfit = [path for path in unfit if path in matches]
        if not matches and target != ALL_LINEAR:
            missing.append(repr(target))
        elif unfit:
            reason = why_not_adaptable(tree.bases[unfit[0]])
            faults.append(f"Target {target!r} matches {unfit[0]}, but {reason}.")
        if twice := [path for path in matches if layers.get(path, slices) != slices]:
            faults.append(f"Target {target!r} matches {twice[0]}, of which other slices are named.")
        layers |= dict.fromkeys(matches, slices)
    if missing:
        faults.append(f"No module matches target {', '.join(missing)}. {_hint(tree)}")
    return layers, faults


def _all_linear(tree: Tree) -> list[str]:
    """Every linear layer but the output head: the one called so, or tied to an embedding."""
    head = getattr(tree.root, "get_output_embeddings", lambda: None)()  # transformers' models
    embeddings = {id(m.weight) for m in tree.bases.values() if isinstance(m, nn.Embedding)}
    reasons = {path: _why_left_out(module) for path, module in tree.bases.items()}
    if left_out := [f"{path}: {reason}" for path, reason in reasons.items() if reason]:
        # The caller of lora.inject: the verb, draw and find_targets lie between.
        warnings.warn(f"{ALL_LINEAR} leaves out {listed(left_out)}.", stacklevel=6)
    layers = ((path, tree.bases[path]) for path in _linear(tree) if not fits(path, "lm_head"))
    return [path for path, m in layers if m is not head and id(m.weight) not in embeddings]


def _linear(tree: Tree) -> list[str]:
    linear = [path for path, m in tree.bases.items() if path and not isinstance(m, nn.Embedding)]
    return [path for path in linear if not why_not_adaptable(tree.bases[path])]


def _why_left_out(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        return why_not_adaptable(module)
    convolutional = isinstance(module, nn.modules.conv._ConvNd)
    experts = [
        n for n, p in module.named_parameters(recurse=False) if p.dim() == 3 and 1 not in p.shape
    ]
    return f"its {' and '.join(experts)} are 3-D" if experts and not convolutional else None


def _block(path: str) -> int | None:
    """The number of a layer's block: `transformer.h.3.mlp.c_fc` is in 3."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)


def _hint(tree: Tree) -> str:
    words = {path: [w for w in path.split(".") if not w.isdecimal()] for path in _linear(tree)}
    ends = sorted({".".join(parts[-2:]) or path for path, parts in words.items()})
    if not ends:
        return "There are no linear modules below it."
    return f"Linear modules here end in: {', '.join(ends[:12])}. Pass targets=(...) using these."
