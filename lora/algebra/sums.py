"""Arithmetic on adapters, exact for any ranks and scalings.

An adapter here is a value: for each layer's path a pair of factors, in float64 and with the scaling
folded into B, so that the layer's delta is `B A` and nothing else. Values come from `factors` (a
model), `read` (a folder) or `extract` (a tuned model); `implant` puts one on a model.

Shapes: A `(r, in)`, B `(out, r)`, delta `(out, in)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora.building import build, require_rank
from lora.config import UpdateConfig, is_finite
from lora.disk.folder import open_folder
from lora.injection import attach
from lora.layout import why_not_adaptable
from lora.messages import brief, listed
from lora.tree import survey, survey_adapted
from lora.updates import LowRankUpdate


@dataclass(frozen=True)
class Factors:
    """One layer's delta as `B A`."""

    A: Tensor
    B: Tensor

    @property
    def r(self) -> int:
        """The number of columns of B; the delta's rank is at most this."""
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """`B A`, `(out, in)`."""
        return self.B @ self.A


Adapter = Mapping[str, Factors]
"""Factors by the dotted path of their layer."""


def factors(model: nn.Module, adapter: str = "default") -> dict[str, Factors]:
    """The value of an adapter that a model carries.

    Raises:
        RuntimeError: no adapter here. ValueError: none of this name.
    """
    tree = survey_adapted(model)
    carrying = tree.carrying(adapter)
    updates = {path: tree.layers[path].update(adapter) for path in carrying if path in tree.layers}
    if whole := [p for p in carrying if p not in updates or updates[p].bias is not None]:
        raise ValueError(f"{adapter!r} trains more than factors: a copy or a bias of {whole[0]}.")
    return {path: _value(update) for path, update in updates.items()}


def read(folder: str | Path) -> dict[str, Factors]:
    """The value of a saved adapter, ours or PEFT's.

    Raises:
        FileNotFoundError, ValueError: as `lora.load`, as far as the folder alone can tell.
    """
    saved = open_folder(folder)
    halves = [path for path, pair in saved.factors.items() if len(pair) < 2]
    if beside := [*saved.copies, *saved.biases]:
        raise ValueError(
            f"{folder} holds more than factors: a copy or a bias of {listed(beside, ', ')}."
        )
    if faults := [*saved.left_over, *halves]:
        raise ValueError(f"{folder}: left over or without a partner: {listed(faults, ', ')}.")
    unfit = [
        path
        for path, pair in saved.factors.items()
        if {len(pair["A"]), pair["B"].shape[-1]} != {saved.config.update_config(path).r}
        or not all(torch.isfinite(factor).all() for factor in pair.values())
    ]
    if unfit:
        raise ValueError(f"{folder}: not of the config's rank, or not finite: {', '.join(unfit)}.")
    return {
        path: Factors(
            pair["A"].double(), pair["B"].double() * saved.config.update_config(path).scaling
        )
        for path, pair in saved.factors.items()
    }


def implant(model: nn.Module, value: Adapter, adapter: str = "default") -> list[str]:
    """Put an adapter's value on a model under a new name and make it the active one.

    Args:
        model: with layers at the value's paths.
        value: its factors are rounded to the dtype that `lora.inject` would choose.
        adapter: the name.

    Returns:
        The dotted paths of the adapted layers.

    Raises:
        ValueError: listing each path that is not there, whose shape differs, whose values are not
            finite, or whose rank is above the layer's smaller side (`compress` loses nothing down
            to that).
        RuntimeError: the model is merged or routed.
    """
    tree, value = survey(model), as_adapter(value)
    updates: dict[str, LowRankUpdate] = {}
    faults: list[str] = [] if value else ["the adapter is empty"]
    for path, pair in value.items():
        try:
            updates[path] = _implanted(tree.bases.get(path), pair)
        except ValueError as error:
            faults.append(f"{path}: {error}")
    if faults:
        raise ValueError(f"The adapter does not fit this model: {'; '.join(faults)}.")
    return attach(tree, adapter, updates)


def scale(value: Adapter, factor: float) -> dict[str, Factors]:
    """`factor` times the adapter, exactly.

    Raises:
        ValueError: a factor that is no finite number.
    """
    if not is_finite(factor):
        raise ValueError(f"The factor must be a finite number, got {brief(factor)}.")
    return {
        path: Factors(pair.A, pair.B * float(factor)) for path, pair in as_adapter(value).items()
    }


def add(*values: Adapter) -> dict[str, Factors]:
    """The exact sum of adapters of any ranks and scalings; the ranks add up.

    Raises:
        ValueError: listing each path where the layers differ in shape.
    """
    return {
        path: Factors(torch.cat([q.A for q in pairs]), torch.cat([q.B for q in pairs], dim=1))
        for path, pairs in by_path(values).items()
    }


def subtract(value: Adapter, other: Adapter) -> dict[str, Factors]:
    """The exact difference: forgetting what `other` taught."""
    return add(value, scale(other, -1.0))


def combine(weighted: Sequence[tuple[Adapter, float]]) -> dict[str, Factors]:
    """The exact weighted sum `Σ w · delta`, without cross terms between A's and B's.

    Raises:
        ValueError: it is no list of pairs, or as `add`.
    """
    given = cast(object, weighted)
    pairs = cast(Sequence[object], given) if isinstance(given, Sequence) else (given,)
    if not all(isinstance(pair, tuple) and len(cast(Any, pair)) == 2 for pair in pairs):
        raise ValueError(f"Give pairs of an adapter and its weight, got {brief(weighted)}.")
    return add(*(scale(value, weight) for value, weight in weighted))


def deltas(value: Adapter) -> dict[str, Tensor]:
    """The dense weight changes, `(out, in)` by path."""
    return {path: pair.delta() for path, pair in as_adapter(value).items()}


def as_adapter(value: Adapter) -> Adapter:
    """The value, if it is one.

    Raises:
        ValueError: saying what is no adapter's value in it.
    """
    given = cast(object, value)
    if not isinstance(given, Mapping):
        raise ValueError(f"An adapter's value maps paths to Factors, got {brief(given)}.")
    for path, pair in cast(Mapping[object, object], given).items():
        if not isinstance(path, str) or not isinstance(pair, Factors):
            raise ValueError(
                f"An adapter's value maps paths to Factors, got {brief({path: pair})}."
            )
        if not (_is_matrix(pair.A) and _is_matrix(pair.B)):
            raise ValueError(f"{path[:80]}: A and B must be matrices of floats, with values.")
    return value


def by_path(values: Sequence[Adapter]) -> dict[str, list[Factors]]:
    """The factors of each layer, from the adapters that have it."""
    values = [as_adapter(value) for value in values]
    paths = dict.fromkeys(path for value in values for path in value)
    pairs = {path: [value[path] for value in values if path in value] for path in paths}
    check_shapes({p: [(q.B.shape[0], q.A.shape[1]) for q in qs] for p, qs in pairs.items()})
    return pairs


def _implanted(base: nn.Module | None, pair: Factors) -> LowRankUpdate:
    if reason := "no such layer here" if base is None else why_not_adaptable(base):
        raise ValueError(reason)
    base = cast(nn.Module, base)
    require_rank(base, pair.r)
    return build(base, UpdateConfig(r=pair.r, alpha=pair.r, dropout=0.0), pair.A, pair.B)


def _is_matrix(tensor: object) -> bool:
    if not isinstance(tensor, Tensor) or tensor.is_meta:
        return False
    return tensor.dim() == 2 and tensor.is_floating_point()


def _value(update: LowRankUpdate) -> Factors:
    a, b = update.factors()
    if a.is_meta:
        raise ValueError("The adapter is on the meta device, which holds no values.")
    scaling = update.config.scaling
    return Factors(a.detach().cpu().double(), b.detach().cpu().double() * scaling)


def check_shapes(shapes: Mapping[str, Sequence[tuple[int, ...]]]) -> None:
    faults = [f"{p}: {' and '.join(map(str, s))}" for p, s in shapes.items() if len(set(s)) > 1]
    if faults:
        raise ValueError(f"Layers differ in shape (out, in): {'; '.join(faults)}.")
