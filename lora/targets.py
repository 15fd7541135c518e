"""Which layers a target names.

`"c_attn"` fits `transformer.h.0.attn.c_attn`, and `"attn.c_proj"` does not fit
`transformer.h.0.mlp.c_proj`; `LoRAConfig` has the other forms.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from typing import TypeVar

from torch import nn

from lora.config import LoRAConfig, as_names, as_numbers
from lora.layout import why_not_adaptable
from lora.slices import split_target
from lora.tree import Tree, listed

T = TypeVar("T")
ALL_LINEAR = "all-linear"


def find_targets(tree: Tree, config: LoRAConfig) -> dict[str, tuple[str, ...]]:
    """The base layers that the config's targets name, by dotted path, each with its slices.

    A shared layer stands under its first path.
    """
    layers, faults = _matches(tree, as_names(config.targets))
    for name in as_names(config.exclude):
        excluded = [path for path in layers if fits(path, name)]
        if not excluded:
            faults.append(f"exclude={name!r} matches no target.")
        layers = {path: slices for path, slices in layers.items() if path not in excluded}
    if config.layers is not None:
        wanted, present = {*as_numbers(config.layers)}, {_block(path) for path in layers}
        if missing := sorted(wanted - present):
            numbers = sorted(number for number in present if number is not None)
            blocks = f"{numbers[0]} to {numbers[-1]}" if numbers else "not numbered"
            faults.append(f"layers={missing} match no target; blocks here are {blocks}.")
        layers = {path: slices for path, slices in layers.items() if _block(path) in wanted}
    if not layers and not faults:
        faults.append("Nothing is left of the targets.")
    if faults:
        raise ValueError(f"{listed(faults)} {_hint(tree)}")
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
    """Whether an entry is a regular expression: no suffix of a path has these characters."""
    return any(character in entry for character in "*+?()|^$\\")


def by_pattern(
    pattern: Mapping[str, T] | None, paths: Collection[str], default: T, name: str
) -> dict[str, T]:
    """The value for each path: that of the first entry in `pattern` that fits, or the default."""
    pattern = pattern or {}
    if idle := [entry for entry in pattern if not any(fits(path, entry) for path in paths)]:
        raise ValueError(f"{name} names {', '.join(idle)}, which match no target.")
    return {
        path: next((value for entry, value in pattern.items() if fits(path, entry)), default)
        for path in paths
    }


def _matches(tree: Tree, targets: tuple[str, ...]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """What the targets match, and what is wrong with them."""
    layers: dict[str, tuple[str, ...]] = {}
    faults: list[str] = []
    for target in targets:
        if target == ALL_LINEAR:
            layers |= dict.fromkeys(_all_linear(tree), ())
            continue
        name, slices = (target, ()) if is_regex(target) else split_target(target)
        matches = [path for path in tree.bases if path and fits(path, name)]
        unfit = [path for path in matches if why_not_adaptable(tree.bases[path])]
        if is_regex(target):  # one that reaches blocks and layers alike means the layers
            matches = [path for path in matches if path not in unfit] or matches
            unfit = [path for path in unfit if path in matches]
        if not matches:
            faults.append(f"No module matches target {target!r}.")
        elif unfit:
            more = f" (and {len(unfit) - 1} more)" if len(unfit) > 1 else ""
            reason = why_not_adaptable(tree.bases[unfit[0]])
            faults.append(f"Target {target!r} matches {unfit[0]}{more}, but {reason}.")
        if twice := [path for path in matches if layers.get(path, slices) != slices]:
            faults.append(f"Target {target!r} matches {twice[0]}, of which other slices are named.")
        layers |= dict.fromkeys(matches, slices)
    return layers, faults


def _all_linear(tree: Tree) -> list[str]:
    """Every linear layer but the output head: the one called so, or tied to an embedding."""
    head = getattr(tree.root, "get_output_embeddings", lambda: None)()  # transformers' models
    embeddings = {id(m.weight) for m in tree.bases.values() if isinstance(m, nn.Embedding)}
    reasons = {path: reason for path, m in tree.bases.items() if (reason := _why_left_out(m))}
    if reasons:
        (path, reason), n = next(iter(reasons.items())), len(reasons) - 1
        more = f" (and {n} more)" if n else ""
        # The caller of lora.inject or Population: the verb, draw and find_targets lie between.
        warnings.warn(f"{ALL_LINEAR} leaves out {path}{more}: {reason}.", stacklevel=6)
    layers = ((path, tree.bases[path]) for path in _linear(tree) if not fits(path, "lm_head"))
    return [path for path, m in layers if m is not head and id(m.weight) not in embeddings]


def _linear(tree: Tree) -> list[str]:
    """Every linear layer that can be adapted."""
    return [
        path
        for path, module in tree.bases.items()
        if path and not isinstance(module, nn.Embedding) and not why_not_adaptable(module)
    ]


def _why_left_out(module: nn.Module) -> str | None:
    """Why "all-linear" cannot adapt a module that computes linear maps."""
    if isinstance(module, nn.Linear):
        return why_not_adaptable(module)
    convolutional = isinstance(module, nn.modules.conv._ConvNd)
    experts = [n for n, p in module.named_parameters(recurse=False) if p.dim() == 3]
    return f"its {' and '.join(experts)} are 3-D" if experts and not convolutional else None


def _block(path: str) -> int | None:
    """The number of the block that a layer is in: `transformer.h.3.mlp.c_fc` is in 3."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)


def _hint(tree: Tree) -> str:
    """What could have been asked for."""
    # Names without block numbers; of a plain nn.Sequential the numbers are all that there is.
    words = {
        path: [part for part in path.split(".") if not part.isdecimal()] for path in _linear(tree)
    }
    if ends := sorted({".".join(parts[-2:]) or path for path, parts in words.items()}):
        return (
            f"Linear modules here end in: {listed(ends).replace(';', ',')}. "
            "Pass targets=(...) using these."
        )
    if why_not_adaptable(tree.root) is None:
        return (
            f"The model is itself one {type(tree.root).__name__}: wrap it, as in "
            "torch.nn.Sequential(layer), and pass targets='0'."
        )
    return "There are no linear modules here."
