"""An adapter's folder in PEFT's format: what its files hold, by the paths of a model.

PEFT writes, each behind `base_model.model.`:
    PATH.lora_A.weight, PATH.lora_B.weight                      an update; lora_embedding_A, _B
    PATH.base_layer.weight                                      the base's own, for embeddings
    PATH.base_layer.bias, or PATH.bias where no update is       a trained bias
    PATH.NAME                                                   a module trained as a whole
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora.disk import files, hub, peft_config
from lora.disk.peft_config import PeftConfig

CONFIG, WEIGHTS = hub.CONFIG, hub.WEIGHTS
PAIR = "lora_config_sha256"  # key in the metadata: what the config says that was saved with it
PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", re.DOTALL)
_BASE = re.compile(r"(.+?)\.(base_layer|original_module)\.(.+)", re.DOTALL)
_TRIES, _PAUSE = 20, 0.01  # of reading while another process writes; seconds between them

ByPath = Mapping[str, Mapping[str, Tensor]]
"""Tensors by the path of their module, then by their name in it."""


@dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """What an adapter folder holds.

    Args:
        config: what adapter_config.json says.
        factors: A and B by the path of their layer, each `{"A": (r, in), "B": (out, r)}`.
        copies: modules that were trained as a whole (PEFT's `modules_to_save`).
        biases: trained biases by the path of their layer (PEFT's `bias`).
        base: tensors of the base that PEFT wrote beside them.
        left_over: all other tensors, by their keys.
        metadata: of the safetensors file.
    """

    config: PeftConfig
    factors: ByPath
    copies: ByPath
    biases: Mapping[str, Tensor]
    base: ByPath
    left_over: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def open_folder(folder: str | Path) -> SavedAdapter:
    """Read an adapter folder, or a repository on the Hub, without a model to put it on.

    While another process writes there, it is read until both files are of one save.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: as `lora.load`.
    """
    config_file, weights_file = hub.locate(folder)
    for _ in range(_TRIES):
        config = peft_config.read(config_file)
        tensors, metadata = files.read(weights_file)
        if metadata.get(PAIR) in (None, config.digest):  # PEFT's own files do not say
            return from_tensors(tensors, config, metadata)
        time.sleep(_PAUSE)
    raise ValueError(
        f"{CONFIG} in {folder} does not say what it said when {WEIGHTS} was saved: a save was "
        "interrupted between the two, or one was edited or replaced. Save the adapter again."
    )


def from_tensors(
    tensors: Mapping[str, Tensor], config: PeftConfig, metadata: Mapping[str, str]
) -> SavedAdapter:
    """Sort the tensors of a file by what they are."""
    factors: dict[str, dict[str, Tensor]] = {}
    base: dict[str, dict[str, Tensor]] = {}
    copies: dict[str, dict[str, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    left_over: dict[str, Tensor] = {}
    for key in sorted(tensors, key=lambda k: ("modules_to_save." in k, k)):  # doubles come last
        name, tensor = key.removeprefix(PREFIX), tensors[key]
        if factor := _FACTOR.fullmatch(name):
            if factors.setdefault(factor[1], {}).setdefault(factor[2], tensor) is not tensor:
                left_over[key] = tensor
        elif of_base := _BASE.fullmatch(name):
            path, kind, inner = of_base.groups()
            if config.bias != "none" and (kind, inner) == ("base_layer", "bias"):
                biases[path] = tensor
            else:
                base.setdefault(path, {})[inner] = tensor
        elif copied := _copied(name, config.copies):
            path, inner = copied
            if not _stands_twice(inner, tensor, copies.get(path, {})):
                copies.setdefault(path, {})[inner] = tensor
        elif config.bias == "all" and name.endswith(".bias"):
            biases[name.removesuffix(".bias")] = tensor
        else:
            left_over[key] = tensor
    return SavedAdapter(
        config=config,
        factors=factors,
        copies=copies,
        biases=biases,
        base=base,
        left_over=left_over,
        metadata=metadata,
    )


def to_tensors(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    embeddings: Collection[str] = (),
    copies: ByPath | None = None,
    biases: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a file, by PEFT's keys.

    Args:
        factors: A `(r, in)` and B `(out, r)` by the path of their layer.
        embeddings: those paths whose layer is an `nn.Embedding`.
        copies: modules that were trained as a whole.
        biases: trained biases by the path of their layer, adapted or not.
    """
    tensors: dict[str, Tensor] = {}
    for path, pair in factors.items():
        for name, factor in zip("AB", pair, strict=True):
            key = f"lora_embedding_{name}" if path in embeddings else f"lora_{name}.weight"
            tensors[f"{PREFIX}{path}.{key}"] = factor
    for path, module in (copies or {}).items():
        tensors |= {f"{PREFIX}{path}.{name}": tensor for name, tensor in module.items()}
    for path, bias in (biases or {}).items():
        tensors[f"{PREFIX}{path}.{'base_layer.' if path in factors else ''}bias"] = bias
    return tensors


def _copied(name: str, ends: Collection[str]) -> tuple[str, str] | None:
    """The module trained as a whole in which a tensor is, and its name there.

    PEFT compares the ends of paths, and not on whole segments.
    """
    parts = name.split(".")
    for i in range(1, len(parts)):
        path = ".".join(parts[:i])
        if any(path.endswith(end) for end in ends):
            return path, ".".join(parts[i:])
    return None


def _stands_twice(inner: str, tensor: Tensor, copy: Mapping[str, Tensor]) -> bool:
    """Whether this is a copy's bias once more, as `bias="all"` makes PEFT write it."""
    double = inner.removeprefix("modules_to_save.")
    names = (double, double.partition(".")[2]) if double != inner else ()  # an adapter's name too
    return any(name in copy and torch.equal(copy[name], tensor) for name in names)
