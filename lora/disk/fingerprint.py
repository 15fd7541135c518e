"""Some entries of each base weight, by which another base is detected."""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora.layout import out_in_view

BASE, ENTRIES = "lora_base_entries", 16  # key in our metadata; how many of a weight

Fingerprint = list[float | str]  # the dtype of a weight, then some of its entries


def describe(bases: Mapping[str, nn.Module]) -> dict[str, str]:
    """The metadata for base layers by path, without those that cannot be read."""
    prints = {path: _fingerprint(base) for path, base in bases.items()}
    return {BASE: json.dumps({path: entries for path, entries in prints.items() if entries})}


def differing(metadata: Mapping[str, str], bases: Mapping[str, nn.Module]) -> list[str]:
    """The paths of layers that differ by more than the rounding of their dtypes."""
    saved: dict[str, Fingerprint] = json.loads(metadata.get(BASE, "{}"))
    other: list[str] = []
    for path, base in bases.items():
        entries = _fingerprint(base) if path in saved else None
        if entries and not _close(entries, saved[path]):
            other.append(path)
    return other


def _fingerprint(base: nn.Module) -> Fingerprint | None:
    weight: Any = base.get_parameter("weight").detach()
    if weight.is_meta:
        return None
    try:
        if hasattr(weight, "full_tensor"):  # each process has a part of it
            weight = weight.full_tensor()
        view = out_in_view(base, weight)
        # Steps of large primes lie in no pattern.
        steps = torch.arange(1, ENTRIES + 1, device=view.device)
        entries = view[steps * 7919 % view.shape[0], steps * 104729 % view.shape[1]].tolist()
    except (IndexError, NotImplementedError):  # packed by a quantiser
        return None
    finite = all(map(math.isfinite, entries))
    return [str(weight.dtype).removeprefix("torch."), *entries] if finite else None


def _close(a: Fingerprint, b: Fingerprint) -> bool:
    coarser = max((torch.finfo(getattr(torch, str(p[0]))) for p in (a, b)), key=lambda f: f.eps)
    x, y = (torch.tensor(p[1:], dtype=torch.float64) for p in (a, b))
    return torch.allclose(x, y, rtol=coarser.eps, atol=coarser.eps * coarser.smallest_normal)
