"""PEFT's format both ways: `adapter_config.json`, and the keys of the tensors beside it.

PEFT writes, each key behind `base_model.model.`:
    PATH.lora_A.weight, PATH.lora_B.weight   an update; lora_embedding_A and _B of an nn.Embedding
    PATH.base_layer.NAME                     a tensor of the base, beside an update
    PATH.NAME                                a tensor of a module that was trained whole

The tensors say which layers are adapted, and their ranks.
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from lora.config import UpdateConfig, as_names

PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
_BASE = re.compile(r".+\.(?:base_layer|original_module)\..+")

# Fields that change nothing in what the adapter computes.
_NOTES = frozenset(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "fan_in_fan_out megatron_core qalora_group_size runtime_config loftq_config eva_config".split()
)
# Any other field that is set is refused.
_KNOWN = frozenset(
    "r lora_alpha lora_dropout use_rslora target_modules exclude_modules layers_to_transform "
    "layers_pattern rank_pattern alpha_pattern bias modules_to_save init_lora_weights".split()
)
# Ways of drawing A and B that leave the base and the formula as they are.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")

T = TypeVar("T")
ByPath = Mapping[str, Mapping[str, Tensor]]
"""Tensors by the path of their module, then by their name in it."""


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The part of the file that is read."""

    alpha: float
    dropout: float
    rslora: bool
    alpha_pattern: Mapping[re.Pattern[str], float]  # by a pattern for a whole path
    copies: tuple[str, ...]  # ends of paths of modules that were trained whole
    digest: str  # of the fields that change what it computes

    def update_config(self, path: str, r: int) -> UpdateConfig:
        """The config of an update of this rank at this path."""
        fitting = (a for key, a in self.alpha_pattern.items() if key.fullmatch(path))
        alpha = next(fitting, self.alpha)
        return UpdateConfig(r=r, alpha=alpha, dropout=self.dropout, rslora=self.rslora)


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """The tensors of a file."""

    factors: ByPath  # A `(r, in)` and B `(out, r)` of each layer
    copies: ByPath  # of modules that were trained whole
    beside: Mapping[str, Tensor]  # all others, by their names in the model


def parse(text: bytes | str) -> PeftConfig:
    """A config from its text."""
    try:
        fields: dict[str, Any] = json.loads(text)
        method = fields.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"it is not a JSON object: {error}") from None
    faults: list[str] = []
    if method != "LORA":
        faults.append(f"peft_type is {method!r}, only LORA can be loaded")
    if (bias := fields.get("bias") or "none") != "none":
        faults.append(f"bias is {bias!r}: trained biases are not supported")
    if (init := fields.get("init_lora_weights")) not in _INITS:
        faults.append(f"init_lora_weights {init!r} changed the base weights or the formula")
    for name in sorted(fields.keys() - _NOTES - _KNOWN):
        if fields[name]:
            faults.append(f"{name} is {fields[name]!r:.120}, which is not supported")
    if faults:
        raise ValueError("; ".join(faults))
    alphas: dict[str, float] = fields.get("alpha_pattern") or {}
    computing = {name: value for name, value in fields.items() if name not in _NOTES}
    return PeftConfig(
        alpha=fields.get("lora_alpha", 8),
        dropout=fields.get("lora_dropout", 0.0),
        rslora=bool(fields.get("use_rslora")),
        alpha_pattern={  # PEFT's rule: a path or its end
            re.compile(rf"(?:.*\.)?(?:{key})"): alpha for key, alpha in alphas.items()
        },
        copies=as_names(fields.get("modules_to_save") or ()),
        digest=hashlib.sha256(json.dumps(computing, sort_keys=True).encode()).hexdigest(),
    )


def sort_tensors(tensors: Mapping[str, Tensor], config: PeftConfig) -> Tensors:
    """Sort the tensors of a file by what they are."""
    factors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    copies: dict[str, dict[str, Tensor]] = defaultdict(dict)
    beside: dict[str, Tensor] = {}
    for key, tensor in sorted(tensors.items()):
        name = key.removeprefix(PREFIX).replace("_orig_mod.", "")  # torch.compile's
        name = name.replace(".modules_to_save.", ".")  # so embeddings stand there once more
        if factor := _FACTOR.fullmatch(name):
            factors[factor[1]][factor[2]] = tensor
        elif not _BASE.fullmatch(name) and (copied := _copied(name, config.copies)):
            copies[copied[0]][copied[1]] = tensor
        else:
            beside[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor
    return Tensors(factors=factors, copies=copies, beside=beside)


def to_tensors(
    factors: Mapping[str, Sequence[Tensor]], embeddings: Collection[str], copies: ByPath
) -> dict[str, Tensor]:
    """The tensors of a file by PEFT's keys."""
    tensors: dict[str, Tensor] = {}
    for path, pair in factors.items():
        for name, factor in zip("AB", pair, strict=True):
            key = f"lora_embedding_{name}" if path in embeddings else f"lora_{name}.weight"
            tensors[f"{PREFIX}{path}.{key}"] = factor
    for path, module in copies.items():
        tensors |= {f"{PREFIX}{path}.{name}": tensor for name, tensor in module.items()}
    return tensors


def to_config(
    updates: Mapping[str, UpdateConfig],
    paths: Collection[str],
    copies: Collection[str] = (),
    **notes: object,
) -> str:
    """The config of an adapter, which fits none but its layers among the `paths` of a base."""
    first = next(iter(updates.values()))  # dropout and rsLoRA are one choice an adapter
    r = _most_common(u.r for u in updates.values())
    alpha = _most_common(u.alpha for u in updates.values())
    if clashes := [p for p in paths if p not in copies and any(p.endswith(c) for c in copies)]:
        ends = ", ".join(copies)
        raise ValueError(f"PEFT takes {', '.join(clashes)} for {ends}, as their paths end alike.")
    fields: dict[str, object] = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        "target_modules": _targets(set(updates), paths),
        "rank_pattern": {_exact(p, updates): u.r for p, u in updates.items() if u.r != r},
        "alpha_pattern": {
            _exact(p, updates): u.alpha for p, u in updates.items() if u.alpha != alpha
        },
        "use_rslora": first.rslora,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        **notes,
    }
    if copies:
        fields["modules_to_save"] = sorted(copies)
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def _copied(name: str, ends: Collection[str]) -> tuple[str, str] | None:
    """The path of the module trained whole that holds a tensor, and its name there."""
    parts = name.split(".")
    paths = (".".join(parts[:i]) for i in range(1, len(parts)))
    path = next((path for path in paths if path.endswith(tuple(ends))), None)
    return None if path is None else (path, name.removeprefix(f"{path}."))


def _most_common(values: Iterable[T]) -> T:
    return Counter(values).most_common(1)[0][0]


def _exact(path: str, paths: Collection[str]) -> str:
    alone = not any(other.endswith(f".{path}") for other in paths)
    return re.escape(path) if alone else f"^{re.escape(path)}"


def _targets(adapted: set[str], paths: Collection[str]) -> list[str] | str:
    """The ends of the paths, the paths, or a regular expression: what fits no other path."""
    other = [path for path in paths if path not in adapted]
    others = {path.rpartition(".")[2] for path in other}
    ends = {path: path.rpartition(".")[2] for path in adapted}
    targets = {path if end in others else end for path, end in ends.items()}
    endings = tuple(f".{target}" for target in targets)
    if any(path.endswith(endings) for path in other):
        return "|".join(map(re.escape, sorted(adapted)))
    return sorted(targets)
