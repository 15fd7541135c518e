"""Adapters of a given rank from what has none or a higher one, always with the error that it cost.

Shapes: A `(r, in)`, B `(out, r)`, delta `(out, in)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from lora.algebra.sums import Adapter, Factors, as_adapter, by_path, check_shapes, scale
from lora.building import generator
from lora.config import LoRAConfig, Names, is_finite
from lora.layout import out_in_view
from lora.messages import brief
from lora.targets import find_targets
from lora.tree import survey
from lora.untyped import LinAlgError, qr, svd

Deltas = Mapping[str, Tensor]
"""Dense weight changes `(out, in)` by the dotted path of their layer."""
T = TypeVar("T")


@dataclass(frozen=True)
class Approximation:
    """An adapter of a lower rank, and by path the error it made: ‖delta − kept‖ / ‖delta‖."""

    adapter: dict[str, Factors]
    errors: dict[str, float]


def compress(value: Adapter, r: int) -> Approximation:
    """The nearest adapter of rank `r` (in the Frobenius norm), with the error it made.

    The SVD is that of an `r × r` core between two QR factors; no dense delta is formed.

    Raises:
        ValueError: `r` is not a positive integer, or values that are not finite.
    """

    def nearest(pair: Factors) -> tuple[Factors, float]:
        q_out, r_out = qr(pair.B.double())  # (out, r)(r, r)
        q_in, r_in = qr(pair.A.double().T)  # (in, r)(r, r)
        u, s, vt = svd(r_out @ r_in.T)
        return _truncate(q_out @ u, s, vt @ q_in.T, r)

    return _approximate(as_adapter(value), nearest, r)


def approximate(changes: Deltas, r: int) -> Approximation:
    """The nearest adapter of rank `r` to dense weight changes, with the error it made.

    Raises:
        ValueError: `r` is not a positive integer, or a change is no finite matrix.
    """
    given = cast(object, changes)
    pairs = cast(Mapping[object, object], given).items() if isinstance(given, Mapping) else [(0, 0)]
    if not all(
        isinstance(path, str) and isinstance(delta, Tensor) and delta.dim() == 2
        for path, delta in pairs
    ):
        raise ValueError(f"Give dense changes (out, in) by path, got {brief(changes)}.")
    return _approximate(changes, lambda delta: _truncate(*svd(delta.cpu().double()), r), r)


def extract(
    base: nn.Module, tuned: nn.Module, r: int, targets: Names = "all-linear"
) -> Approximation:
    """The adapter that turns `base` into a fully fine-tuned `tuned`, as well as rank `r` can.

    Args:
        base, tuned: models with the same module tree.
        r: rank of every layer's update.
        targets: the layers to take, as for `lora.inject`.

    Raises:
        ValueError: a target that matches nothing or names slices, or layers of other shapes.
    """
    tree, after = survey(base), survey(tuned).bases
    before = tree.bases
    found = find_targets(tree, LoRAConfig(targets=targets))
    paths = list(found)
    if sliced := [path for path in paths if found[path]]:
        raise ValueError(f"Slices cannot be extracted, only whole layers: {', '.join(sliced)}.")
    if missing := [path for path in paths if path not in after]:
        raise ValueError(f"The tuned model has no {', '.join(missing)}.")
    weights = {p: (_weight(before[p]), _weight(after[p])) for p in paths}
    check_shapes({path: [tuple(w.shape) for w in pair] for path, pair in weights.items()})
    return approximate({path: new - old for path, (old, new) in weights.items()}, r)


def ties(
    values: Sequence[Adapter], density: float, weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Merge deltas by TIES: trim the small entries, elect a sign, average those that agree.

    Args:
        values: the adapters.
        density: share in (0, 1] of each delta's entries to keep, the largest.
        weights: of the adapters; 1 each by default.

    Returns:
        Dense deltas by path, for `approximate`.

    Raises:
        ValueError: a density out of range, or no or unequally many values and weights.

    Source: Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models".
    """

    def merge(_: str, changes: list[Tensor]) -> Tensor:
        trimmed = torch.stack([_largest(change, density) for change in changes])
        agreeing = trimmed * (trimmed.sign() == trimmed.sum(0).sign())
        return agreeing.sum(0) / agreeing.count_nonzero(0).clamp(min=1)

    return _merged(values, density, weights, merge)


def dare(
    values: Sequence[Adapter], density: float, weights: Sequence[float] | None = None, *, seed: int
) -> dict[str, Tensor]:
    """Sum deltas by DARE: keep each entry by chance and rescale, so that the mean stays.

    Args:
        values, density, weights: as for `ties`; `density` is here each entry's chance to be kept.
        seed: of the draw.

    Returns, Raises: as `ties`.

    Source: Yu et al. 2024, "Language Models are Super Mario", section 3.
    """

    if type(seed) is not int or abs(seed) >= 2**63:
        raise ValueError(f"seed must be a 64-bit integer, got {brief(seed)}.")

    def merge(path: str, changes: list[Tensor]) -> Tensor:
        own = generator(seed, path)  # so that the order of layers does not matter
        kept = [torch.rand(c.shape, generator=own, device=own.device) < density for c in changes]
        return torch.stack([c * k / density for c, k in zip(changes, kept, strict=True)]).sum(0)

    return _merged(values, density, weights, merge)


def _merged(
    values: Sequence[Adapter],
    density: float,
    weights: Sequence[float] | None,
    merge: Callable[[str, list[Tensor]], Tensor],
) -> dict[str, Tensor]:
    """Apply `merge` to the weighted deltas of each layer."""
    if not isinstance(cast(object, values), Sequence) or isinstance(values, str):
        raise ValueError(f"Give several adapters' values, got {brief(values)}.")
    weights = [1.0] * len(values) if weights is None else weights
    if not isinstance(cast(object, weights), Sequence) or isinstance(weights, str):
        raise ValueError(f"Give the adapters' weights, got {brief(weights)}.")
    if not is_finite(density) or not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {brief(density)}.")
    if not values or len(weights) != len(values):
        raise ValueError(f"Give as many weights as adapters: {len(weights)} for {len(values)}.")
    scaled = [scale(value, weight) for value, weight in zip(values, weights, strict=True)]
    return {
        path: merge(path, [q.delta() for q in pairs]) for path, pairs in by_path(scaled).items()
    }


def _largest(change: Tensor, density: float) -> Tensor:
    """The change with all but its largest entries set to zero."""
    kept = change.abs().flatten().topk(math.ceil(density * change.numel())).indices
    return (
        torch.zeros_like(change)
        .flatten()
        .index_copy(0, kept, change.flatten()[kept])
        .view_as(change)
    )


def _approximate(
    values: Mapping[str, T], nearest: Callable[[T], tuple[Factors, float]], r: int
) -> Approximation:
    if type(r) is not int or r < 1:
        raise ValueError(f"r must be an integer of at least 1, got {brief(r)}.")
    try:
        found = {path: nearest(value) for path, value in values.items()}
    except LinAlgError as error:
        raise ValueError(f"The values are not finite, or too large: {error}") from None
    return Approximation(
        {path: pair for path, (pair, _) in found.items()},
        {path: error for path, (_, error) in found.items()},
    )


def _truncate(u: Tensor, s: Tensor, vt: Tensor, r: int) -> tuple[Factors, float]:
    """The `r` largest singular triplets, shared evenly between A and B, and what is lost."""
    root = s[:r].sqrt()
    total = float(s.square().sum())
    error = math.sqrt(float(s[r:].square().sum()) / total) if total else 0.0
    return Factors(root[:, None] * vt[:r], u[:, :r] * root), error


def _weight(base: nn.Module) -> Tensor:
    weight = out_in_view(base, base.get_parameter("weight")).detach()
    if weight.is_meta:
        raise ValueError("A model is on the meta device, which holds no values.")
    return weight.cpu().double()
