"""PEFT's `adapter_config.json` read: which layers an adapter has, with which rank and alpha.

Source of the format and of its matching rules: PEFT, `LoraConfig` and `tuners_utils`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

from lora.config import UpdateConfig
from lora.disk import strict_json
from lora.messages import brief, cut, listed
from lora.patterns import chooser, compile_safely, suffix_pattern

# Fields that say nothing about what the adapter computes. Any other field that is set and is not
# read below is refused, so that a feature this library lacks is never dropped in silence.
_HARMLESS = frozenset(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "fan_in_fan_out megatron_core qalora_group_size runtime_config loftq_config eva_config".split()
)
_READ = frozenset(
    "r lora_alpha lora_dropout use_rslora target_modules exclude_modules layers_to_transform "
    "layers_pattern rank_pattern alpha_pattern bias modules_to_save init_lora_weights".split()
)
# Ways of drawing A and B that leave the base and the formula as they are; others do not.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The part of the file that this library reads.

    Args:
        r, alpha, dropout, rslora: of layers that no pattern names.
        targets, exclude: a regular expression, or suffixes.
        layers: numbers of the blocks, of those that suffixes name; empty for all.
        layers_pattern: names of the lists in which the blocks are numbered; empty for any.
        rank_pattern, alpha_pattern: other ranks and alphas by regular expressions.
        bias: which biases were trained: "none", "all", or "lora_only" for those of adapted layers.
        copies: ends of the paths of modules that were trained as a whole.
        digest: tells this config from one that computes something else.
    """

    r: int
    alpha: float
    dropout: float
    rslora: bool
    targets: str | tuple[str, ...]
    exclude: str | tuple[str, ...]
    layers: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    bias: str
    copies: tuple[str, ...]
    digest: str = field(compare=False)

    def matches(self, path: str) -> bool:
        """Whether PEFT would adapt the layer at this path."""
        if self._excluded(path) or any(copied(path) for copied in self._copied):
            return False
        if not self._targeted(path):
            return False
        if not self.layers or path in self.targets:
            return True
        return _block(path, self.layers_pattern) in self.layers

    def update_config(self, path: str) -> UpdateConfig:
        """Rank, alpha and dropout of the layer at this path."""
        return UpdateConfig(
            r=next((r for fits, r in self._ranks if fits(path)), self.r),
            alpha=next((alpha for fits, alpha in self._alphas if fits(path)), self.alpha),
            dropout=self.dropout,
            rslora=self.rslora,
        )

    @cached_property
    def _targeted(self) -> Callable[[str], bool]:
        return chooser(self.targets)

    @cached_property
    def _excluded(self) -> Callable[[str], bool]:
        return chooser(self.exclude)

    @cached_property
    def _copied(self) -> list[Callable[[str], bool]]:
        return [compile_safely(rf"(^|.*\.)({name})($|\..*)") for name in self.copies]

    @cached_property
    def _ranks(self) -> list[tuple[Callable[[str], bool], int]]:
        return [(suffix_pattern(key), r) for key, r in self.rank_pattern.items()]

    @cached_property
    def _alphas(self) -> list[tuple[Callable[[str], bool], float]]:
        return [(suffix_pattern(key), alpha) for key, alpha in self.alpha_pattern.items()]


def read(file: Path) -> PeftConfig:
    """Read and check a config.

    Raises:
        FileNotFoundError: no such file.
        ValueError: listing all that is malformed in it, or that this library cannot do.
    """
    try:
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{file} is missing: {file.parent} is no adapter folder.") from None
    try:
        return parse(data)
    except ValueError as error:
        raise ValueError(f"{cut(file)}: {cut(error, 1600).rstrip('.')}.") from None


def parse(data: bytes | str) -> PeftConfig:
    """A config from its text.

    Raises:
        ValueError: as `read`, without a full stop.
    """
    try:
        fields = strict_json.parse_object(data)
    except ValueError as error:
        raise ValueError(f"it is not JSON that can be read: {error}") from None
    if faults := _faults(fields):
        raise ValueError(listed(faults))
    config = PeftConfig(
        r=fields.get("r", 8),
        alpha=fields.get("lora_alpha", 8),
        dropout=fields.get("lora_dropout", 0.0),
        rslora=bool(fields.get("use_rslora")),
        targets=_entries(fields["target_modules"]),
        exclude=_entries(fields.get("exclude_modules") or ()),
        layers=_several(fields.get("layers_to_transform")),
        layers_pattern=_several(fields.get("layers_pattern") or None),
        rank_pattern=fields.get("rank_pattern") or {},
        alpha_pattern=fields.get("alpha_pattern") or {},
        bias=fields.get("bias", "none"),
        copies=_several(fields.get("modules_to_save")),
        digest=_digest(fields),
    )
    # Each is in range, or this says what is not.
    UpdateConfig(r=config.r, alpha=config.alpha, dropout=config.dropout)
    for r in config.rank_pattern.values():
        UpdateConfig(r=r, alpha=1, dropout=0.0)
    for alpha in config.alpha_pattern.values():
        UpdateConfig(r=1, alpha=alpha, dropout=0.0)
    return config


def _digest(fields: Mapping[str, Any]) -> str:
    """Of what the adapter computes: notes beside it and the way it is written may change."""
    telling = {name: value for name, value in fields.items() if name not in _HARMLESS}
    return hashlib.sha256(json.dumps(telling, sort_keys=True).encode()).hexdigest()


def _faults(fields: dict[str, Any]) -> list[str]:
    faults: list[str] = []
    if fields.get("peft_type") != "LORA":
        faults.append(f"peft_type is {brief(fields.get('peft_type'))}, only LORA can be loaded")
    if fields.get("bias", "none") not in ("none", "all", "lora_only"):
        faults.append(f"bias is {brief(fields['bias'])}, not 'none', 'all' or 'lora_only'")
    if (init := fields.get("init_lora_weights")) not in _INITS:
        faults.append(
            f"init_lora_weights {brief(init)} changed the base weights or the formula, "
            "so the adapter fits no plain base"
        )
    if not fields.get("target_modules"):
        faults.append("target_modules is missing or empty")
    for name in ("target_modules", "exclude_modules"):
        if not _is_several(fields.get(name), str):
            wanted = "a regular expression or a list of names"
            faults.append(f"{name} is {brief(fields[name])}, not {wanted}")
        elif isinstance(fields.get(name), str):
            faults += _malformed(name, fields[name], compile_safely)
    for name in ("rank_pattern", "alpha_pattern"):
        pattern: Any = fields.get(name) or {}
        if not isinstance(pattern, dict):
            faults.append(f"{name} is {brief(pattern)}, not an object of regular expressions")
        for key in cast(dict[str, Any], pattern) if isinstance(pattern, dict) else ():
            faults += _malformed(name, key, suffix_pattern)
    faults += _faults_of_blocks(fields)
    if not _is_several(copies := fields.get("modules_to_save"), str) or isinstance(copies, str):
        faults.append(f"modules_to_save is {brief(copies)}, not a list of names")
    for name in _several(copies):
        faults += _malformed("modules_to_save", str(name), compile_safely)
    for name in sorted(fields.keys() - _HARMLESS - _READ):
        if fields[name]:
            faults.append(f"{cut(name, 60)} is {brief(fields[name])}, which is not supported")
    return faults


def _faults_of_blocks(fields: Mapping[str, Any]) -> list[str]:
    """As PEFT has it: numbers of blocks go with suffixes, names of lists go with numbers."""
    numbers, lists = fields.get("layers_to_transform"), fields.get("layers_pattern")
    faults: list[str] = []
    if not _is_several(numbers, int):
        faults.append(f"layers_to_transform is {brief(numbers)}, not integers")
    named: list[Any] = list(_several(lists)) if _is_several(lists, str) else [None]
    if not all(isinstance(name, str) and name.replace(".", "_").isidentifier() for name in named):
        faults.append(f"layers_pattern is {brief(lists)}, and only plain names are supported")
    if isinstance(fields.get("target_modules"), str) and (numbers is not None or lists):
        faults.append("layers_to_transform and layers_pattern take a list of target_modules")
    if lists and numbers is None:
        faults.append("layers_pattern takes layers_to_transform")
    return faults


def _malformed(name: str, text: str, compiled: Callable[[str], object]) -> list[str]:
    try:
        compiled(text)
    except ValueError as error:
        return [f"{name}: {error}"]
    return []


def _is_several(value: Any, kind: type) -> bool:
    """Whether the value is unset, of this kind, or a list of this kind; a bool is no number."""
    values = cast(list[Any], value) if isinstance(value, list) else [value]
    return value is None or all(type(v) is kind for v in values)


def _several(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(cast(list[Any], value)) if isinstance(value, list) else (value,)


def _entries(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value)


def _block(path: str, lists: tuple[str, ...]) -> int | None:
    """The number of a layer's block: the first below one of these lists, or below any two names."""
    parts = path.split(".")
    for name in lists or (None,):
        for i, part in enumerate(parts[:-1]):
            above = ".".join(parts[:i])
            named = i > 1 if name is None else f".{above}".endswith(f".{name}")
            if part.isdecimal() and named:
                return int(part)
    return None
