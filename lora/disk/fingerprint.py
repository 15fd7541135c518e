"""A few entries of each base weight, by which loading detects an adapter of another base."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora.layout import out_in_view

BASE = "lora_base_entries"  # key in a safetensors file's metadata
ENTRIES = 16

Fingerprint = list[float | str]
"""The dtype of a weight, then some of its entries."""


def describe(bases: Mapping[str, nn.Module]) -> dict[str, str]:
    """The metadata for these base layers by path; those that cannot be read are left out."""
    prints = {path: _fingerprint(base) for path, base in bases.items()}
    return {BASE: json.dumps({path: entries for path, entries in prints.items() if entries})}


def differing(metadata: Mapping[str, str], bases: Mapping[str, nn.Module]) -> list[str]:
    """The paths of layers that are not those of the metadata, to the rounding of their dtypes."""
    saved: dict[str, Fingerprint] = json.loads(metadata.get(BASE, "{}"))
    here = {path: _fingerprint(base) for path, base in bases.items() if path in saved}
    return [path for path, entries in here.items() if entries and not _close(entries, saved[path])]


def _fingerprint(base: nn.Module) -> Fingerprint | None:
    weight: Any = base.get_parameter("weight").detach()
    if weight.is_meta:
        return None
    try:
        if hasattr(weight, "full_tensor"):  # each process has a part of it
            weight = weight.full_tensor()
        view = out_in_view(base, weight)
        # Steps of large primes, so that the entries lie in no pattern.
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
