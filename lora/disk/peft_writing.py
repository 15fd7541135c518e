"""PEFT's `adapter_config.json` written, so that it fits exactly the layers that were adapted."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from torch import Tensor
from torch.nn import functional as F

from lora.config import UpdateConfig
from lora.messages import listed

T = TypeVar("T")


def dumps(
    updates: Mapping[str, UpdateConfig],
    *,
    paths: Collection[str],
    fan_in_fan_out: bool = False,
    causal_lm: bool = False,
    base_name: str | None = None,
    copies: Collection[str] = (),
    biases: Collection[str] = (),
) -> str:
    """The config of an adapter; the same adapter gives the same text.

    Args:
        updates: what each update is made of, by the path of its layer.
        paths: of all modules of the base, whether they can be adapted or not.
        fan_in_fan_out, causal_lm, base_name: what PEFT notes of the base.
        copies: paths of modules that were trained as a whole.
        biases: paths of layers whose bias was trained.

    Raises:
        ValueError: PEFT would take another module for one that was trained as a whole.
    """
    any_update = next(iter(updates.values()))  # dropout and rsLoRA are one choice an adapter
    r = _most_common(u.r for u in updates.values())
    alpha = _most_common(u.alpha for u in updates.values())
    if alike := [p for p in paths if p not in copies and any(p.endswith(c) for c in copies)]:
        raise ValueError(
            f"modules_to_save would also take {listed(alike, ', ', 200)}, whose path ends like "
            f"that of a module trained as a whole ({listed(copies, ', ', 200)}); rename one."
        )
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal_lm else None,
        "base_model_name_or_path": base_name,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": any_update.dropout,
        "target_modules": _targets(set(updates), paths),
        "rank_pattern": {_exact(p, updates): u.r for p, u in updates.items() if u.r != r},
        "alpha_pattern": {
            _exact(p, updates): u.alpha for p, u in updates.items() if u.alpha != alpha
        },
        "fan_in_fan_out": fan_in_fan_out,
        "use_rslora": any_update.rslora,
        "bias": "none" if not biases else "lora_only" if set(biases) <= set(updates) else "all",
        "inference_mode": True,
        "init_lora_weights": True,
    }
    if copies:
        fields["modules_to_save"] = sorted(copies)
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def uniform(
    configs: Mapping[str, UpdateConfig], factors: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[dict[str, UpdateConfig], dict[str, tuple[Tensor, Tensor]]]:
    """The same deltas with one rank, and an alpha that makes the scaling 1."""
    r = max(config.r for config in configs.values())
    padded: dict[str, tuple[Tensor, Tensor]] = {}
    for path, (a, b) in factors.items():
        b = (b.double() * configs[path].scaling).to(b.dtype)
        missing = r - configs[path].r
        padded[path] = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
    return {p: replace(c, r=r, alpha=r, rslora=False) for p, c in configs.items()}, padded


def _most_common(values: Iterable[T]) -> T:
    return Counter(values).most_common(1)[0][0]


def _exact(path: str, paths: Collection[str]) -> str:
    """A pattern that fits this path and none of the others."""
    alone = not any(other.endswith(f".{path}") for other in paths)
    return re.escape(path) if alone else f"^{re.escape(path)}"


def _targets(adapted: set[str], paths: Collection[str]) -> list[str] | str:
    """The last segments of the paths where they fit no other module, else the paths.

    A path that ends another module's, as `up` ends `block.up`, takes a regular expression.
    """
    alike: dict[str, list[str]] = defaultdict(list)  # modules by the last segment of their path
    for path in paths:
        alike[_last(path)].append(path)
    targets = {_last(path) if adapted.issuperset(alike[_last(path)]) else path for path in adapted}
    for target in targets & adapted:
        if any(p.endswith(f".{target}") for p in alike[_last(target)] if p not in adapted):
            return "|".join(map(re.escape, sorted(adapted)))
    return sorted(targets)


def _last(path: str) -> str:
    return path.rpartition(".")[2]
