"""Rows of one batch under different adapters, without a loop over adapters.

The factors of the whole bank are stacked, each row picks its own, and two batched products do the
rest. Entered with gradients off, the context stacks and picks once, so that a forward pass costs
about what one adapter's does; else each forward pass does, and nothing can go stale.

Shapes: B rows · n adapters in the bank · k adapters in a row's mixture · r rank, padded to the
largest · … any axes between the rows and the features.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.bank import Mixture, as_mixture
from lora.fast.dropout import drop
from lora.layer import EmbeddingUpdate, LoRALinear, LowRankUpdate
from lora.layout import widest_float
from lora.tree import listed, survey_adapted


@contextmanager
def routed(model: nn.Module, rows: Sequence[Mixture | None]) -> Generator[None]:
    """Within the context row b of every batch is under the adapter(s) `rows[b]`, and no other.

    Works in inference and in training; each row gets what it would get alone (in float32 and
    wider; in 16 bits, to rounding). To train several adapters in one batch, `lora.activate` them
    all before. Rows are the first axis of every adapted layer's input. Entered with gradients off
    (`torch.no_grad()`), it uses the factors of that moment, until a forward pass runs with
    gradients; entered with them on, those of each forward pass.

    Args:
        model: a model with adapters.
        rows: for each row an adapter's name, a mixture such as `{"legal": 0.7, "poet": 0.3}`, or
            None for the base.

    Raises:
        ValueError: no rows, a name that the model does not carry, a weight that is not finite.
        RuntimeError: no adapter here, the model is merged, or in training mode the adapters named
            differ in dropout, or some of them train and others do not.
    """
    tree = survey_adapted(model)
    tree.refuse_merged()
    if isinstance(rows, str | Mapping) or not rows:
        raise ValueError("rows must give an adapter (or None) for each row of the batch.")
    names = list(dict.fromkeys(name for row in rows for name in _names(row)))
    if missing := [name for name in names if name not in tree.adapters]:
        raise ValueError(f"There is no adapter {listed(missing)} here ({tree.named()}).")
    mixtures = [{} if row is None else as_mixture(row, tree) for row in rows]
    if tree.copies:
        raise RuntimeError(
            f"Adapters train a copy of {next(iter(tree.copies))}, so rows cannot be routed."
        )
    layers = list(tree.layers.values())
    updates = [layer.update(name) for layer in layers for name in names if name in layer.updates]
    if model.training and torch.is_grad_enabled():
        trained = [any(p.requires_grad for p in update.parameters()) for update in updates]
        if any(trained) and not all(trained):
            raise RuntimeError(f"To train {', '.join(names)} together, lora.activate them all.")
    if len({update.drop_rate for update in updates}) > 1:
        raise RuntimeError("Adapters that are trained in one batch must have the same dropout.")
    routings = [_routing(layer, tree.adapters, mixtures) for layer in layers]
    before = [layer.routing for layer in layers]
    for layer, routing in zip(layers, routings, strict=True):
        layer.routing = routing
    try:
        yield
    finally:
        for layer, routing in zip(layers, before, strict=True):
            layer.routing = routing


class BankRouting:
    """The updates that each row of a batch gets in one layer.

    Args:
        bank: the layer's updates by the bank's numbering; None where it has none.
        named: the numbers of those that a row is under.
        index: `(B, k)` numbers of each row's adapters. Number n, after the last, is a zero update,
            to which empty entries point.
        scales: `(B, k)` the factor of each, its scaling included.
        dropout: probability of dropping an input feature.
        rows: what each row is under.
    """

    def __init__(
        self,
        bank: Sequence[LowRankUpdate | None],
        named: Collection[int],
        index: Tensor,
        scales: Tensor,
        dropout: float,
        rows: object,
    ) -> None:
        self.bank, self.named, self.dropout, self.rows = bank, named, dropout, rows
        self.like = next(update for update in bank if update is not None)
        self.index, self.scales = index, scales
        self.rank = max(u.config.r for u in bank if u is not None)
        self.kept = None if torch.is_grad_enabled() else self._picked()

    def __call__(self, x: Tensor) -> Tensor:
        """Map `(B, …, in)`, or token ids `(B, …)`, to what the updates add, `(B, …, out)`."""
        B = len(self.index)
        if not x.dim() or x.shape[0] != B:
            raise ValueError(f"The batch has {x.shape[0]} rows, but {B} are routed.")
        if torch.is_grad_enabled():
            self.kept = None  # who trains may have changed the factors by the next pass
        a, b = self.kept or self._picked()
        if isinstance(self.like, EmbeddingUpdate):
            leading, h = x.shape, self._looked_up(x.reshape(B, -1), a)
        else:
            if self.dropout and self.like.training:
                x, _ = drop(x, self.dropout)
            leading = x.shape[:-1]
            h = x.reshape(B, -1, x.shape[-1]) @ a.to(x.dtype).mT  # (B, -1, k·r)
        return (h @ b.to(h.dtype).mT).reshape(*leading, b.shape[1])

    def _looked_up(self, ids: Tensor, bank: Tensor) -> Tensor:
        """What `(B, T)` ids select of each row's own Aᵀ, `(B, T, k·r)`, out of all Aᵀ's."""
        padding_idx = cast(EmbeddingUpdate, self.like).padding_idx
        h = F.embedding(ids, bank.flatten(0, 1).t(), padding_idx)  # (B, T, n·r)
        h = h.reshape(*ids.shape, len(bank), self.rank)
        index = self.index[:, None, :, None].expand(-1, h.shape[1], -1, self.rank)
        return h.gather(2, index).flatten(2)

    def _picked(self) -> tuple[Tensor, Tensor]:
        """Each row's A's `(B, k·r, in)` (an embedding's all) and scaled B's `(B, out, k·r)`."""
        blank = tuple(torch.zeros_like(f) for f in self.like.factors())
        pairs = [blank if update is None else update.factors() for update in self.bank]
        for number, (a, b) in enumerate(pairs):
            if number not in self.named:  # no gradient, not even one of zeros
                pairs[number] = a.detach(), b.detach()
        whole = [self._padded(*pair) for pair in [*pairs, blank]]
        a, b = (torch.stack([pair[i] for pair in whole]) for i in (0, 1))  # (n+1, r, in)(…, out, r)
        if not isinstance(self.like, EmbeddingUpdate):
            a = a[self.index].flatten(1, 2)  # (B, k·r, in)
        b = b[self.index] * self.scales[:, :, None, None].to(b.dtype)  # (B, k, out, r)
        return a, b.transpose(1, 2).flatten(2)  # (B, out, k·r)

    def _padded(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        missing = self.rank - a.shape[0]
        return F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))


def _names(row: Mixture | None) -> Sequence[str]:
    return (row,) if isinstance(row, str) else tuple(row or ())


def _routing(
    layer: LoRALinear, names: Sequence[str], mixtures: Sequence[Mapping[str, float]]
) -> BankRouting:
    """The routing of one layer; an adapter that it lacks adds nothing here."""
    bank = [layer.update(name) if name in layer.updates else None for name in names]
    numbers = {name: number for number, name in enumerate(names)}
    named = {numbers[name] for mixture in mixtures for name in mixture}
    k = max(1, *map(len, mixtures))
    index: list[list[int]] = []
    scales: list[list[float]] = []
    for mixture in mixtures:
        used = {n: w * layer.gain for n, w in mixture.items() if n in layer.updates}
        index.append([*(numbers[n] for n in used), *[len(bank)] * (k - len(used))])
        factors = (w * layer.update(n).config.scaling for n, w in used.items())
        scales.append([*factors, *[0.0] * (k - len(used))])
    dropouts = [u.config.dropout for i, u in enumerate(bank) if u is not None and i in named]
    device = next(layer.updates.parameters()).device
    return BankRouting(
        bank,
        named,
        torch.tensor(index, device=device),
        torch.tensor(scales, device=device, dtype=widest_float(device)),
        max(dropouts, default=0.0),
        mixtures,
    )
