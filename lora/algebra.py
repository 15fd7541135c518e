"""Arithmetic on adapters as values: exact sums, and lower ranks with their error.

A value is a pair of factors in float64 for each layer's path, with the scaling folded into B.

Shapes: A `(r, in)`, B `(out, r)`, delta `(out, in)`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lora.config import LoRAConfig, Names, UpdateConfig
from lora.disk import checkpoint
from lora.injection import attach, build, generator, require_rank
from lora.layout import out_in_view
from lora.targets import find_targets
from lora.tree import refuse, survey, survey_adapted

Triplets = tuple[Tensor, Tensor, Tensor]
"""An SVD: `(out, n)`, `(n,)`, `(n, in)`."""


@dataclass(frozen=True)
class Factors:
    """One layer's delta as `B A`."""

    A: Tensor
    B: Tensor

    @property
    def r(self) -> int:
        """The delta's rank is at most this."""
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """`B A`, `(out, in)`."""
        return self.B @ self.A


Adapter = Mapping[str, Factors]
"""Factors by the dotted path of their layer."""


@dataclass(frozen=True)
class Approximation:
    """An adapter of a lower rank, and by path the error it made: ‖delta − kept‖ / ‖delta‖."""

    adapter: dict[str, Factors]
    errors: dict[str, float]


def factors(model: nn.Module, adapter: str = "default") -> dict[str, Factors]:
    """The value of an adapter that a model carries; one that trains a copy is a ValueError."""
    tree = survey_adapted(model)
    carrying = tree.carrying(adapter)
    refuse([p for p in carrying if p in tree.copies], "It trains more than factors: a copy of {}.")
    values: dict[str, Factors] = {}
    for path in carrying:
        update = tree.layers[path].update(adapter)
        a, b = (factor.detach().cpu().double() for factor in update.factors())
        values[path] = Factors(a, b * update.config.scaling)
    return values


def read(folder: str | Path) -> dict[str, Factors]:
    """The value of a saved adapter, ours or PEFT's; raises what `lora.load` does."""
    config, tensors, _ = checkpoint.read(folder)
    refuse([*tensors.copies, *tensors.beside], f"{folder} holds more than factors: {{}}.")
    values: dict[str, Factors] = {}
    for path, pair in tensors.factors.items():
        if missing := {"A", "B"} - pair.keys():
            raise ValueError(f"{folder}: {path} has no lora_{missing.pop()}.")
        a, b = pair["A"].double(), pair["B"].double()
        values[path] = Factors(a, b * config.update_config(path, len(a)).scaling)
    return values


def implant(model: nn.Module, value: Adapter, adapter: str = "default") -> list[str]:
    """Put a value on a model as a new adapter, and make it the active one.

    Args:
        model: with layers at the value's paths.
        value: rounded to the dtype that `lora.inject` would choose.
        adapter: the name.

    Returns:
        The dotted paths of the adapted layers.

    Raises:
        ValueError: listing each path that is not there, or whose shape, values or rank do not fit.
        RuntimeError: the model is merged or routed.
    """
    tree = survey(model)
    updates: dict[str, nn.Module] = {}
    faults: list[str] = [] if value else ["the adapter is empty"]
    for path, pair in value.items():
        try:
            config = UpdateConfig(r=pair.r, alpha=pair.r, dropout=0.0)
            if path not in tree.bases:
                raise ValueError("no such layer here")
            updates[path] = build(tree.bases[path], config, pair.A, pair.B)
            require_rank(tree.bases[path], pair.r)
        except ValueError as error:
            faults.append(f"{path}: {error}")
    refuse(faults, "The adapter does not fit this model: {}.")
    return attach(tree, adapter, updates)


def scale(value: Adapter, factor: float) -> dict[str, Factors]:
    """`factor` times the adapter, exactly."""
    return {path: Factors(pair.A, pair.B * float(factor)) for path, pair in value.items()}


def add(*values: Adapter) -> dict[str, Factors]:
    """The exact sum of adapters of any ranks and scalings; the ranks add up.

    Raises:
        ValueError: listing each path where the layers differ in shape.
    """
    total: dict[str, Factors] = {}
    for path, pairs in _by_path(values).items():
        a, b = [pair.A for pair in pairs], [pair.B for pair in pairs]
        total[path] = Factors(torch.cat(a), torch.cat(b, dim=1))
    return total


def subtract(value: Adapter, other: Adapter) -> dict[str, Factors]:
    """The exact difference: forgetting what `other` taught."""
    return add(value, scale(other, -1.0))


def compress(value: Adapter, r: int) -> Approximation:
    """The nearest adapter of rank `r` (in the Frobenius norm), with the error it made.

    The SVD is that of an `r × r` core between two QR factors; no dense delta is formed.
    """
    svds: dict[str, Triplets] = {}
    for path, pair in value.items():
        q_out, r_out = torch.linalg.qr(pair.B.double())  # (out, r)(r, r)
        q_in, r_in = torch.linalg.qr(pair.A.double().T)  # (in, r)(r, r)
        u, s, vt = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
        svds[path] = q_out @ u, s, vt @ q_in.T
    return _truncated(svds, r)


def approximate(changes: Mapping[str, Tensor], r: int) -> Approximation:
    """The nearest adapter of rank `r` to dense changes `(out, in)` by path, with its error."""
    svds: dict[str, Triplets] = {}
    for path, change in changes.items():
        svds[path] = torch.linalg.svd(change.cpu().double(), full_matrices=False)
    return _truncated(svds, r)


def extract(
    base: nn.Module, tuned: nn.Module, r: int, targets: Names = "all-linear"
) -> Approximation:
    """The adapter that turns `base` into a fine-tuned `tuned`, as well as rank `r` can.

    Args:
        base, tuned: models with the same module tree.
        r: rank of every layer's update.
        targets: the layers to take, as for `lora.inject`.

    Raises:
        ValueError: an idle target, or layers of other shapes.
    """
    tree, after = survey(base), survey(tuned).bases
    paths = find_targets(tree, LoRAConfig(targets=targets))
    refuse([path for path in paths if path not in after], "The tuned model has no {}.")
    old = {path: _weight(tree.bases[path]) for path in paths}
    new = {path: _weight(after[path]) for path in paths}
    _check_shapes({path: [tuple(old[path].shape), tuple(new[path].shape)] for path in paths})
    return approximate({path: new[path] - old[path] for path in paths}, r)


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
        ValueError: a density out of range, or unequally many values and weights.

    Source: Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models".
    """
    merged: dict[str, Tensor] = {}
    for path, changes in _deltas(values, density, weights):
        trimmed = torch.stack([_largest(change, density) for change in changes])
        agreeing = trimmed * (trimmed.sign() == trimmed.sum(0).sign())
        merged[path] = agreeing.sum(0) / agreeing.count_nonzero(0).clamp(min=1)
    return merged


def dare(
    values: Sequence[Adapter], density: float, weights: Sequence[float] | None = None, *, seed: int
) -> dict[str, Tensor]:
    """Sum deltas by DARE: keep each entry by chance and rescale, so that the mean stays.

    Args:
        values, weights: as for `ties`.
        density: each entry's chance to be kept.
        seed: of the draw.

    Returns, Raises: as `ties`.

    Source: Yu et al. 2024, "Language Models are Super Mario", section 3.
    """
    merged: dict[str, Tensor] = {}
    for path, changes in _deltas(values, density, weights):
        draws = generator(seed, path)  # the order of layers does not matter
        kept = [torch.rand(c.shape, generator=draws, device="cpu") < density for c in changes]
        merged[path] = (torch.stack(changes) * torch.stack(kept) / density).sum(0)
    return merged


def _deltas(
    values: Sequence[Adapter], density: float, weights: Sequence[float] | None
) -> Iterator[tuple[str, list[Tensor]]]:
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}.")
    weights = [1.0] * len(values) if weights is None else weights
    scaled = [scale(value, weight) for value, weight in zip(values, weights, strict=True)]
    for path, pairs in _by_path(scaled).items():
        yield path, [pair.delta() for pair in pairs]


def _by_path(values: Sequence[Adapter]) -> dict[str, list[Factors]]:
    paths = dict.fromkeys(path for value in values for path in value)
    pairs = {path: [value[path] for value in values if path in value] for path in paths}
    _check_shapes({p: [(q.B.shape[0], q.A.shape[1]) for q in qs] for p, qs in pairs.items()})
    return pairs


def _check_shapes(shapes: Mapping[str, Sequence[tuple[int, ...]]]) -> None:
    faults: list[str] = []
    for path, each in shapes.items():
        if len(set(each)) > 1:
            faults.append(f"{path}: {' and '.join(map(str, each))}")
    refuse(faults, "Layers differ in shape (out, in): {}.")


def _largest(change: Tensor, density: float) -> Tensor:
    flat = change.flatten()
    kept = flat.abs().topk(math.ceil(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(change)


def _truncated(svds: Mapping[str, Triplets], r: int) -> Approximation:
    """The `r` largest singular triplets of each, shared evenly between A and B."""
    if r < 1:
        raise ValueError(f"r must be at least 1, got {r}.")
    kept = Approximation({}, {})
    for path, (u, s, vt) in svds.items():
        root, total = s[:r].sqrt(), float(s.square().sum())
        kept.adapter[path] = Factors(root[:, None] * vt[:r], u[:, :r] * root)
        kept.errors[path] = math.sqrt(float(s[r:].square().sum()) / total) if total else 0.0
    return kept


def _weight(base: nn.Module) -> Tensor:
    return out_in_view(base, base.get_parameter("weight")).detach().cpu().double()
