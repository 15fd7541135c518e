"""Rows of one batch under different adapters, without a loop over adapters.

The factors of the whole bank are stacked, each row picks its own, and two batched products do the
rest. Entered with gradients off, the context stacks and picks once, so that a forward pass costs
about what one adapter's does; else each forward pass does, and nothing can go stale.

Shapes: B rows · n adapters in the bank · k adapters in a row's mixture · r rank, padded to the
largest · … any axes between the rows and the features.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.bank import Mixture, as_mixture
from lora.fast.dropout import drop
from lora.layer import LoRALinear
from lora.layout import is_plain, widest_float
from lora.tree import Tree, survey_adapted
from lora.updates import EmbeddingUpdate, LowRankUpdate


@contextmanager
def routed(model: nn.Module, rows: Sequence[Mixture | None]) -> Generator[None]:
    """Within the context row b of every batch is under the adapter(s) `rows[b]`, and no other.

    Works in inference and in training, where the adapters named require grad; each row gets what
    it would get alone (in float32 and wider; in 16 bits, to rounding). Rows are the first axis of
    every adapted layer's input. Entered with gradients off (`torch.no_grad()`), it uses the factors
    of that moment, until a forward pass runs with gradients; entered with them on, those of each
    forward pass. A loss made within must have its backward pass within; later it is an error.

    Args:
        model: a model with adapters.
        rows: for each row an adapter's name, a mixture such as `{"legal": 0.7, "poet": 0.3}`, or
            None for the base.

    Raises:
        ValueError: no rows, a name that the model does not carry, a weight that is not finite.
        RuntimeError: no adapter here, the model is merged, the adapters named differ in dropout
            in training mode, or a layer has a forward of its own.
    """
    tree = survey_adapted(model)
    tree.refuse_merged()
    if not isinstance(cast(object, rows), Sequence) or isinstance(rows, str) or not rows:
        raise ValueError("rows must give an adapter (or None) for each row of the batch.")
    if own := [path for path, layer in tree.layers.items() if not is_plain(layer.base)]:
        raise RuntimeError(f"{own[0]} has a forward of its own, so its rows cannot be routed.")
    if whole := [*tree.copies, *_with_biases(tree)]:
        raise RuntimeError(f"Adapters train a copy of {whole[0]}, so rows cannot be routed.")
    names = tree.adapters
    mixtures = [{} if row is None else as_mixture(row, tree) for row in rows]
    routings = [_routing(layer, names, mixtures) for layer in tree.layers.values()]
    used = {name: True for mixture in mixtures for name in mixture}
    layers = list(tree.layers.values())
    before = [(layer, layer.routing) for layer in layers]
    trained = [{n for n in layer.updates if n not in layer.resting} for layer in layers]

    def restore() -> None:
        for (layer, routing), names in zip(before, trained, strict=True):
            layer.routing = routing
            layer.train_only(dict.fromkeys(names))

    try:
        try:
            for layer, routing in zip(layers, routings, strict=True):
                layer.routing = routing
                layer.train_only(used)
            yield
        finally:
            restore()
    finally:
        restore()  # once more: Ctrl-C may have cut it short


class BankRouting:
    """The updates that each row of a batch gets in one layer.

    Args:
        bank: the layer's updates by the bank's numbering; None where it has none. After the last
            stands one that adds nothing, number n, for rows and places in mixtures left empty.
        index: `(B, k)` numbers of each row's adapters.
        scales: `(B, k)` the factor of each, its scaling included.
        dropout: probability of dropping an input feature in training.
    """

    def __init__(
        self,
        bank: Sequence[LowRankUpdate | None],
        index: Tensor,
        scales: Tensor,
        dropout: float,
    ) -> None:
        self.bank, self.dropout = bank, dropout
        self.some = next(update for update in bank if update is not None)
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
        if isinstance(self.some, EmbeddingUpdate):
            leading, h = x.shape, self._looked_up(x.reshape(B, -1), a)
        else:
            if self.dropout and self.some.training:
                x, _ = drop(x, self.dropout)
            leading = x.shape[:-1]
            h = x.reshape(B, -1, x.shape[-1]) @ a.to(x.dtype).mT  # (B, -1, k·r)
        return (h @ b.to(h.dtype).mT).reshape(*leading, b.shape[1])

    def _looked_up(self, ids: Tensor, bank: Tensor) -> Tensor:
        """What `(B, T)` ids select of each row's own Aᵀ, `(B, T, k·r)`, out of all Aᵀ's."""
        padding_idx = cast(EmbeddingUpdate, self.some).padding_idx
        h = F.embedding(ids, bank.flatten(0, 1).t(), padding_idx)  # (B, T, n·r)
        h = h.reshape(*ids.shape, len(bank), self.rank)
        index = self.index[:, None, :, None].expand(-1, h.shape[1], -1, self.rank)
        return h.gather(2, index).flatten(2)

    def _picked(self) -> tuple[Tensor, Tensor]:
        """Each row's A's `(B, k·r, in)` (an embedding's all) and scaled B's `(B, out, k·r)`."""
        pairs = [None if update is None else update.factors() for update in self.bank]
        blank = tuple(torch.zeros_like(f) for f in self.some.factors())
        whole = [self._padded(*(pair or blank)) for pair in [*pairs, None]]
        a, b = (torch.stack([pair[i] for pair in whole]) for i in (0, 1))  # (n+1, r, in)(…, out, r)
        if not isinstance(self.some, EmbeddingUpdate):
            a = a[self.index].flatten(1, 2)  # (B, k·r, in)
        b = b[self.index] * self.scales[:, :, None, None].to(b.dtype)  # (B, k, out, r)
        return a, b.transpose(1, 2).flatten(2)  # (B, out, k·r)

    def _padded(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        missing = self.rank - a.shape[0]
        return F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))


def _with_biases(tree: Tree) -> list[str]:
    return [
        f"{path}.bias"
        for path, layer in tree.layers.items()
        if any(layer.update(name).bias is not None for name in layer.updates)
    ]


def _routing(
    layer: LoRALinear, names: Sequence[str], mixtures: Sequence[Mapping[str, float]]
) -> BankRouting:
    """The routing of one layer; an adapter that it lacks adds nothing here."""
    bank = [layer.update(name) if name in layer.updates else None for name in names]
    here = {n: update for n, update in zip(names, bank, strict=True) if update is not None}
    used = {name for mixture in mixtures for name in mixture}
    dropouts = {update.config.dropout for name, update in here.items() if name in used}
    some = next(iter(here.values()))
    if some.training and len(dropouts) > 1:
        raise RuntimeError("Adapters that are trained in one batch must have the same dropout.")
    k, blank = max(1, *map(len, mixtures)), len(names)
    picks = [[(names.index(n), w * here[n].config.scaling) for n, w in m.items() if n in here]
             for m in mixtures]  # fmt: skip
    filled = [pick + [(blank, 0.0)] * (k - len(pick)) for pick in picks]
    device = some.A.device
    return BankRouting(
        bank,
        torch.tensor([[number for number, _ in pick] for pick in filled], device=device),
        torch.tensor(
            [[scale for _, scale in pick] for pick in filled],
            device=device,
            dtype=widest_float(device),
        ),
        max(dropouts, default=0.0),
    )
