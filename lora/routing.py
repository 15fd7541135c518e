"""Rows of one batch under different adapters, without a loop over adapters.

Shapes: B rows · n adapters · k adapters in a row's mixture · r rank, padded to the largest ·
… any axes between the rows and the features.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.bank import Mixture, as_mixture
from lora.fast.dropout import drop
from lora.layer import EmbeddingUpdate, LoRALinear
from lora.layout import widest_float
from lora.tree import survey_adapted


@contextmanager
def routed(model: nn.Module, rows: Sequence[Mixture | None]) -> Generator[None]:
    """Within the context row b of every batch is under the adapter(s) `rows[b]`, and no other.

    Rows are the first axis of every adapted layer's input. To train several adapters in one batch,
    `lora.activate` them all before. Entered with gradients off, it uses the factors of that moment.

    Args:
        model: a model with adapters.
        rows: for each row an adapter's name, a mixture as for `lora.activate`, or None.

    Raises:
        ValueError: no rows, an adapter that is not here, a weight that is not finite.
        RuntimeError: no adapter here, the model is merged, or adapters that train together differ
            in dropout, or one of them is not active.
    """
    tree = survey_adapted(model)
    tree.require_unmerged()
    if isinstance(rows, str | Mapping) or not rows:
        raise ValueError("rows must give an adapter (or None) for each row.")
    if tree.copies:
        raise RuntimeError(f"Rows cannot be routed: {next(iter(tree.copies))} is trained whole.")
    named = [name for row in rows for name in ([row] if isinstance(row, str) else row or ())]
    names = as_mixture(dict.fromkeys(named, 1.0), tree)
    mixtures = [as_mixture({} if row is None else row, tree) for row in rows]
    layers = list(tree.layers.values())
    updates = [layer.update(name) for layer in layers for name in names if name in layer.updates]
    if model.training and torch.is_grad_enabled():
        trained = [any(p.requires_grad for p in update.parameters()) for update in updates]
        if any(trained) and not all(trained):
            raise RuntimeError(f"To train {', '.join(names)} together, lora.activate them all.")
    if len({update.drop_rate for update in updates}) > 1:
        raise RuntimeError("Adapters that train in one batch must have the same dropout.")
    routings = [BankRouting(layer, mixtures) for layer in layers]
    before = [layer.routing for layer in layers]
    for layer, routing in zip(layers, routings, strict=True):
        layer.routing = routing
    try:
        yield
    finally:
        for layer, routing in zip(layers, before, strict=True):
            layer.routing = routing


class BankRouting:
    """The updates in one layer of each row of a batch: `rows` gives the weights by name."""

    def __init__(self, layer: LoRALinear, rows: Sequence[Mapping[str, float]]) -> None:
        self.rows = rows
        self.like = next(layer.update(name) for name in layer.updates)
        names = [name for name in layer.updates if any(name in row for row in rows)]
        self.bank = [layer.update(name) for name in names]
        self.rank = max(layer.update(name).config.r for name in layer.updates)
        self.dropout = max((update.config.dropout for update in self.bank), default=0.0)
        k = max(1, *map(len, rows))
        # Empty entries point to a zero update, number n.
        index = [[len(names)] * k for _ in rows]
        scales = [[0.0] * k for _ in rows]
        for b, row in enumerate(rows):
            for i, (name, weight) in enumerate(row.items()):
                if name in names:
                    index[b][i] = names.index(name)
                    scales[b][i] = weight * layer.gain * layer.update(name).config.scaling
        device = self.like.A.device
        self.index = torch.tensor(index, device=device)  # (B, k)
        self.scales = torch.tensor(scales, device=device, dtype=widest_float(device))  # (B, k)
        self.kept = None if torch.is_grad_enabled() else self._picked()

    def __call__(self, x: Tensor) -> Tensor:
        """Map `(B, …, in)`, or token ids `(B, …)`, to what the updates add, `(B, …, out)`."""
        B = len(self.index)
        if x.shape[0] != B:
            raise ValueError(f"The batch has {x.shape[0]} rows, but {B} are routed.")
        if torch.is_grad_enabled():
            self.kept = None  # a training may have changed the factors
        a, b = self.kept or self._picked()
        if isinstance(self.like, EmbeddingUpdate):
            leading = x.shape
            h = self._looked_up(x.reshape(B, -1), a)
        else:
            if self.dropout and self.like.training:
                x, _ = drop(x, self.dropout)
            leading = x.shape[:-1]
            h = x.reshape(B, -1, x.shape[-1]) @ a.to(x.dtype).mT  # (B, -1, k·r)
        return (h @ b.to(h.dtype).mT).reshape(*leading, b.shape[1])

    def _looked_up(self, ids: Tensor, bank: Tensor) -> Tensor:
        """What ids `(B, T)` select of each row's own Aᵀ, `(B, T, k·r)`."""
        padding_idx = cast(EmbeddingUpdate, self.like).padding_idx
        h = F.embedding(ids, bank.flatten(0, 1).t(), padding_idx)  # (B, T, n·r)
        h = h.reshape(*ids.shape, len(bank), self.rank)
        index = self.index[:, None, :, None].expand(-1, h.shape[1], -1, self.rank)
        return h.gather(2, index).flatten(2)

    def _picked(self) -> tuple[Tensor, Tensor]:
        """Each row's A's `(B, k·r, in)` (an embedding's all) and B's `(B, out, k·r)`."""
        pairs = [self._padded(*update.factors()) for update in self.bank]
        a, b = self._padded(*self.like.factors())
        pairs.append((torch.zeros_like(a), torch.zeros_like(b)))
        a = torch.stack([pair[0] for pair in pairs])  # (n+1, r, in)
        b = torch.stack([pair[1] for pair in pairs])  # (n+1, out, r)
        if not isinstance(self.like, EmbeddingUpdate):
            a = a[self.index].flatten(1, 2)  # (B, k·r, in)
        b = b[self.index] * self.scales[:, :, None, None].to(b.dtype)  # (B, k, out, r)
        return a, b.transpose(1, 2).flatten(2)  # (B, out, k·r)

    def _padded(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        missing = self.rank - a.shape[0]
        return F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
