"""PEFT's `adapter_config.json`: which layers an adapter has, with which rank and alpha.

Source of the format and of its matching rules: PEFT, `LoraConfig` and `tuners_utils`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from lora.config import UpdateConfig

# Fields that say nothing about what the adapter computes. Any other field that is set and is not
# read below is refused, so that a feature this library lacks is never dropped in silence.
_HARMLESS = frozenset(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "fan_in_fan_out megatron_core qalora_group_size runtime_config layers_pattern loftq_config "
    "eva_config ensure_weight_tying".split()
)
_READ = frozenset(
    "r lora_alpha lora_dropout use_rslora target_modules exclude_modules layers_to_transform "
    "rank_pattern alpha_pattern bias init_lora_weights".split()
)
# Ways of drawing A and B that also rewrite the base weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The part of the file that this library reads."""

    r: int
    alpha: float
    dropout: float
    rslora: bool
    targets: str | tuple[str, ...]
    exclude: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def matches(self, path: str) -> bool:
        """Whether PEFT would adapt the layer at this path."""
        if _names(self.exclude, path) or not _names(self.targets, path):
            return False
        if self.layers is None:
            return True
        index = re.match(r".*?\.[^.]*\.(\d+)\.", f".{path}")
        return index is not None and int(index[1]) in self.layers

    def update_config(self, path: str) -> UpdateConfig:
        """Rank, alpha and dropout of the layer at this path."""
        return UpdateConfig(
            r=_lookup(self.rank_pattern, path, self.r),
            alpha=_lookup(self.alpha_pattern, path, self.alpha),
            dropout=self.dropout,
            rslora=self.rslora,
        )


def read(file: Path) -> PeftConfig:
    """Read and check a config.

    Raises:
        FileNotFoundError: no such file.
        ValueError: listing all that is malformed in it, or that this library cannot do.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {file.parent} is no adapter folder.")
    try:
        fields: Any = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds a {type(fields).__name__}, not an object.")
    fields = cast(dict[str, Any], fields)
    if faults := _faults(fields):
        raise ValueError(f"{file}: " + "; ".join(faults) + ".")
    layers = fields.get("layers_to_transform")
    config = PeftConfig(
        r=fields.get("r", 8),
        alpha=fields.get("lora_alpha", 8),
        dropout=fields.get("lora_dropout", 0.0),
        rslora=bool(fields.get("use_rslora")),
        targets=_entries(fields["target_modules"]),
        exclude=_entries(fields.get("exclude_modules") or ()),
        layers=None if layers is None else (layers,) if isinstance(layers, int) else tuple(layers),
        rank_pattern=fields.get("rank_pattern") or {},
        alpha_pattern=fields.get("alpha_pattern") or {},
    )
    try:
        for path in ("", *config.rank_pattern, *config.alpha_pattern):
            config.update_config(path)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return config


def dumps(
    updates: Mapping[str, UpdateConfig],
    *,
    linear_paths: Collection[str],
    fan_in_fan_out: bool,
    causal_lm: bool,
    base_name: str | None,
) -> str:
    """The config of an adapter with these updates by path; the same adapter gives the same text."""
    any_update = next(iter(updates.values()))  # dropout and rsLoRA are one choice an adapter
    r = _most_common([u.r for u in updates.values()])
    alpha = _most_common([u.alpha for u in updates.values()])
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal_lm else None,
        "base_model_name_or_path": base_name,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": any_update.dropout,
        "target_modules": _shortest_targets(set(updates), linear_paths),
        "rank_pattern": {_exact(p, updates): u.r for p, u in updates.items() if u.r != r},
        "alpha_pattern": {
            _exact(p, updates): u.alpha for p, u in updates.items() if u.alpha != alpha
        },
        "fan_in_fan_out": fan_in_fan_out,
        "use_rslora": any_update.rslora,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
    }
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def _faults(fields: dict[str, Any]) -> list[str]:
    faults: list[str] = []
    if fields.get("peft_type") != "LORA":
        faults.append(f"peft_type is {fields.get('peft_type')!r}, only LORA can be loaded")
    if fields.get("bias", "none") != "none":
        faults.append(f"bias is {fields['bias']!r}, only 'none' can be loaded")
    if str(fields.get("init_lora_weights")).startswith(_CHANGES_BASE):
        faults.append(f"init_lora_weights {fields['init_lora_weights']!r} changed the base weights")
    if not fields.get("target_modules"):
        faults.append("target_modules is missing or empty")
    for name in ("target_modules", "exclude_modules"):
        faults += _malformed(name, fields.get(name), "a regular expression or a list of names", str)
    faults += _malformed("layers_to_transform", fields.get("layers_to_transform"), "integers", int)
    for name in ("rank_pattern", "alpha_pattern"):
        value: Any = fields.get(name) or {}
        if not isinstance(value, dict) or not all(map(_is_regex, cast(dict[str, Any], value))):
            faults.append(f"{name} is {value!r}, not an object of regular expressions")
    for name in sorted(fields.keys() - _HARMLESS - _READ):
        if fields[name]:
            faults.append(f"{name} is {fields[name]!r}, which is not supported")
    return faults


def _malformed(name: str, value: Any, wanted: str, kind: type) -> list[str]:
    """A fault unless the value is unset, of this kind, or a list of this kind."""
    values = cast(list[Any], value) if isinstance(value, list) else [value]
    fits = all(isinstance(v, kind) for v in values)
    if value is None or (fits and (not isinstance(value, str) or _is_regex(value))):
        return []
    return [f"{name} is {value!r}, not {wanted}"]


def _is_regex(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _entries(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value)


def _names(entries: str | tuple[str, ...], path: str) -> bool:
    """PEFT's rule: a string is a regular expression, a list holds suffixes."""
    if isinstance(entries, str):
        return re.fullmatch(entries, path) is not None
    return any(f".{path}".endswith(f".{entry}") for entry in entries)


def _lookup(pattern: Mapping[str, T], path: str, default: T) -> T:
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def _most_common(values: Collection[T]) -> T:
    return Counter(values).most_common(1)[0][0]


def _exact(path: str, paths: Collection[str]) -> str:
    """A pattern that fits this path and none of the others."""
    alone = not any(other.endswith(f".{path}") for other in paths)
    return re.escape(path) if alone else f"^{re.escape(path)}"


def _shortest_targets(paths: set[str], linear_paths: Collection[str]) -> list[str] | str:
    """The last segments of the paths where they fit no other layer, else the paths.

    A path that ends another layer's, as `up` ends `block.up`, takes a regular expression.
    """
    targets: set[str] = set()
    for path in paths:
        last = path.rpartition(".")[2]
        alike = {p for p in linear_paths if f".{p}".endswith(f".{last}")}
        targets.add(last if alike <= paths else path)
    if any(_names(tuple(targets), path) for path in linear_paths if path not in paths):
        return "|".join(map(re.escape, sorted(paths)))
    return sorted(targets)
