"""Which layers a target names.

A target is a dotted suffix of a module's path, matched on whole segments: `"c_attn"` fits
`transformer.h.0.attn.c_attn`, and `"attn.c_proj"` does not fit `transformer.h.0.mlp.c_proj`.
`"c_attn[q,v]"` names two slices of such a layer, `"all-linear"` every linear layer but the head.
An entry with one of the characters `*+?()|^$\\` is a regular expression for the whole path.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import TypeVar

from torch import nn

from lora.config import LoRAConfig, as_names
from lora.layout import why_not_adaptable
from lora.messages import brief
from lora.patterns import compile_safely
from lora.slices import split_target
from lora.tree import Tree

T = TypeVar("T")
ALL_LINEAR = "all-linear"
SHOWN = 12  # names that a hint lists


def find_targets(tree: Tree, config: LoRAConfig) -> dict[str, tuple[str, ...]]:
    """The base layers that the config's targets name, by dotted path, each with its slices.

    A shared layer stands under its first path.

    Raises:
        ValueError: listing each target that matches nothing, or something that cannot be adapted,
            and each exclusion and layer number that matches no target.
    """
    found, faults = _matches(tree, as_names(config.targets))
    for name in as_names(config.exclude):
        excluded = [path for path in found if fits(path, name)]
        if not excluded:
            faults.append(f"exclude={brief(name)} matches no target.")
        found = {path: slices for path, slices in found.items() if path not in excluded}
    if config.layers is not None:
        wanted, present = set(config.layers), {_block(path) for path in found}
        if missing := sorted(wanted - present):
            there = sorted(number for number in present if number is not None)
            blocks = f"{there[0]} to {there[-1]}" if there else "not numbered"
            faults.append(f"layers={brief(missing)} match no target; blocks here are {blocks}.")
        found = {path: slices for path, slices in found.items() if _block(path) in wanted}
    if not found and not faults and config.targets:
        faults.append("Nothing is left of the targets.")
    if faults:
        raise ValueError(" ".join([*faults[:SHOWN], _hint(tree)]))
    return {path: found[path] for path in tree.bases if path in found}


def fits(path: str, entry: str) -> bool:
    """Whether a dotted suffix fits the path on whole segments, or a regular expression all of it.

    Raises:
        ValueError: a regular expression that is none, or that could take very long.
    """
    if is_regex(entry):
        return compile_safely(entry)(path)
    return f".{path}".endswith(f".{entry}")


def is_regex(entry: str) -> bool:
    """Whether an entry is a regular expression: no suffix of a path has these characters."""
    return any(character in entry for character in "*+?()|^$\\")


def by_pattern(
    pattern: Mapping[str, T] | None, paths: Collection[str], default: T, name: str
) -> dict[str, T]:
    """The value for each path: that of the first entry in `pattern` that fits, or the default.

    Raises:
        ValueError: listing each entry that fits no path.
    """
    pattern = pattern or {}
    if idle := [entry for entry in pattern if not any(fits(path, entry) for path in paths)]:
        shown = ", ".join(map(brief, idle[:SHOWN]))
        raise ValueError(f"{name} names {shown}, which match no target.")
    return {
        path: next((value for entry, value in pattern.items() if fits(path, entry)), default)
        for path in paths
    }


def _matches(tree: Tree, targets: tuple[str, ...]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """What the targets match, and what is wrong with them."""
    found: dict[str, tuple[str, ...]] = {}
    faults: list[str] = []
    for target in targets:
        name, slices = (target, ()) if is_regex(target) else split_target(target)
        if target == ALL_LINEAR:
            found |= dict.fromkeys(_all_linear(tree), slices)
            continue
        matches = [path for path in tree.bases if path and fits(path, name)]
        unfit = [path for path in matches if why_not_adaptable(tree.bases[path])]
        if is_regex(target):  # one that reaches blocks and layers alike means the layers
            matches = [path for path in matches if path not in unfit] or matches
            unfit = [path for path in unfit if path in matches]
        if not matches:
            faults.append(f"No module matches target {brief(target)}.")
        elif unfit:
            more = f" (and {len(unfit) - 1} more)" if len(unfit) > 1 else ""
            reason = why_not_adaptable(tree.bases[unfit[0]])
            faults.append(f"Target {brief(target)} matches {unfit[0]}{more}, but {reason}.")
        if twice := [path for path in matches if found.get(path, slices) != slices]:
            faults.append(
                f"Target {brief(target)} matches {twice[0]}, of which other slices are named."
            )
        found |= dict.fromkeys(matches, slices)
    return found, faults


def _all_linear(tree: Tree) -> list[str]:
    """Every linear layer but the output head: the one called so, or tied to an embedding."""
    head = getattr(tree.root, "get_output_embeddings", lambda: None)()  # transformers' models
    embeddings = {id(m.weight) for m in tree.bases.values() if isinstance(m, nn.Embedding)}
    linear = {path: m for path, m in tree.bases.items() if isinstance(m, nn.Linear)}
    reasons = {path: reason for path, m in linear.items() if (reason := why_not_adaptable(m))}
    if reasons:
        (path, reason), n = next(iter(reasons.items())), len(reasons) - 1
        more = f" (and {n} more)" if n else ""
        warnings.warn(f"{ALL_LINEAR} leaves out {path}{more}: {reason}.", stacklevel=2)
    return [
        path
        for path, module in tree.bases.items()
        if path
        and not why_not_adaptable(module)
        and not isinstance(module, nn.Embedding)
        and module is not head
        and not fits(path, "lm_head")
        and id(module.weight) not in embeddings
    ]


def _block(path: str) -> int | None:
    """The number of the block that a layer is in: `transformer.h.3.mlp.c_fc` is in 3."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)


def _hint(tree: Tree) -> str:
    """What could have been asked for."""
    linear = [
        path
        for path, module in tree.bases.items()
        if path and not why_not_adaptable(module) and not isinstance(module, nn.Embedding)
    ]
    # Names without block numbers; of a plain nn.Sequential the numbers are all that there is.
    suffixes = sorted({_last_words(path) for path in linear})
    if suffixes:
        more = f" and {len(suffixes) - SHOWN} more" if len(suffixes) > SHOWN else ""
        return (
            f"Linear modules here end in: {', '.join(suffixes[:SHOWN])}{more}. "
            "Pass targets=(...) using these."
        )
    if why_not_adaptable(tree.root) is None:
        return (
            f"The model is itself one {type(tree.root).__name__}: wrap it, as in "
            "torch.nn.Sequential(layer), and pass targets='0'."
        )
    return "There are no linear modules here."


def _last_words(path: str) -> str:
    words = [part for part in path.split(".") if not part.isdecimal()]
    return ".".join(words[-2:]) or path
