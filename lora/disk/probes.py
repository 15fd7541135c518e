"""A few projections of a weight, by which loading tells another base, or swapped factors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora.disk import strict_json
from lora.layout import out_in_view
from lora.messages import cut, listed
from lora.untyped import whole

BASE, UPDATES = "lora_base_probes", "lora_update_probes"  # keys in a safetensors file's metadata


def describe(
    bases: Mapping[str, nn.Module], factors: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, str]:
    """What a file says of the base layers and of the A and B in it, both by path.

    It says nothing of a base that holds no values, or none that are finite.
    """
    real = {p: base for p, base in bases.items() if not base.get_parameter("weight").is_meta}
    made_for = {path: _base_probe(base) for path, base in real.items()}
    made_for = {p: probe for p, probe in made_for.items() if _are_finite(probe["probe"])}
    saved = {path: _update_probe(a, b) for path, (a, b) in factors.items()}
    saved = {path: probe for path, probe in saved.items() if _are_finite(probe)}
    return {BASE: json.dumps(made_for), UPDATES: json.dumps(saved)}


def faults(
    metadata: Mapping[str, str],
    bases: Mapping[str, nn.Module],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    allow_base_mismatch: bool,
) -> list[str]:
    """What the probes in a file contradict; PEFT's own files have none."""
    try:
        made_for: dict[str, Any] = strict_json.parse_object(metadata.get(BASE, "{}"))
        saved: dict[str, list[float]] = strict_json.parse_object(metadata.get(UPDATES, "{}"))
        other = [p for p in bases if p in made_for and not _same_base(made_for[p], bases[p])]
        edited = [p for p in factors if p in saved and not _same_update(saved[p], *factors[p])]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        return [f"its metadata is malformed ({cut(error)})"]
    found = [f"{p}: A and B are not the ones that were saved (transposed? edited?)" for p in edited]
    if other and not allow_base_mismatch:
        found.append(
            f"it was made for another base, whose weights differ in {listed(other, ', ', 160)} "
            "(allow_base_mismatch=True loads it all the same)"
        )
    return found


def _probe_vectors(n: int) -> Tensor:
    """Four fixed, irregular vectors `(n, 4)`, each with a mean square of about 1."""
    squares = torch.arange(1, n + 1, dtype=torch.float64).square()
    return math.sqrt(2) * torch.stack([torch.sin(squares * k) for k in (0.7, 1.1, 1.3, 1.7)], 1)


def _base_probe(base: nn.Module) -> dict[str, Any]:
    """What tells this base weight from another: dtype, size, projections of its direction."""
    weight = out_in_view(base, whole(base.get_parameter("weight").detach())).cpu().double()
    left, right = _probe_vectors(weight.shape[0]), _probe_vectors(weight.shape[1])
    norm = _norm(weight)
    values = left[:, 0] @ weight @ right / (norm or 1.0)
    dtype = str(base.get_parameter("weight").dtype).removeprefix("torch.")
    return {"dtype": dtype, "probe": _floats(values), "norm": float(f"{norm:.6e}")}


def _update_probe(a: Tensor, b: Tensor) -> list[float]:
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    left, right = _probe_vectors(b.shape[0]), _probe_vectors(a.shape[1])
    return _floats((left[:, 0] @ b) @ (a @ right))


def _norm(tensor: Tensor) -> float:
    # On the CPU, since not every device has float64.
    return math.sqrt(float(tensor.detach().cpu().double().square().sum()))


def _floats(vector: Tensor) -> list[float]:
    # Rounded, so that the order in which a machine sums does not show in the file.
    return [float(f"{float(value):.6e}") for value in vector]


def _are_finite(values: Iterable[float]) -> bool:
    return all(map(math.isfinite, values))


def _same_base(saved: Mapping[str, Any], base: nn.Module) -> bool:
    """Whether the weights agree to the rounding of the coarser dtype of the two."""
    here = _base_probe(base)
    coarser = max(torch.finfo(getattr(torch, d["dtype"])).eps for d in (saved, here))
    slack = max(coarser, 1e-5)
    norm = saved.get("norm", here["norm"])  # files of before have none
    same_size = abs(here["norm"] - norm) <= slack * norm
    return same_size and _close(here["probe"], saved["probe"], slack)


def _same_update(saved: list[float], a: Tensor, b: Tensor) -> bool:
    slack = 0.01 * _norm(a) * _norm(b) + 1e-30  # the file may have been cast to 16 bits
    return _close(_update_probe(a, b), saved, slack)


def _close(a: list[float], b: list[float], slack: float) -> bool:
    return all(abs(x - y) <= slack for x, y in zip(a, b, strict=True))
