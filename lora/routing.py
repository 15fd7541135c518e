"""Rows of one batch under different adapters, without a loop over adapters.

The factors of the whole bank are stacked, each row picks its own, and two batched products do the
rest. In inference the picking is done once, so that a forward pass costs about what one adapter
does; with gradients, and in compiled code, the bank is stacked again in each.

Shapes: B rows · n adapters in the bank · k adapters in a row's mixture · r rank, padded to the
largest · … any axes between the rows and the features.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.bank import Mixture, adapter_names, as_mixture
from lora.layer import EmbeddingUpdate, LoRALinear, LowRankUpdate
from lora.layout import widest_float
from lora.targets import refuse_merged, require_layers


@contextmanager
def routed(model: nn.Module, rows: Sequence[Mixture | None]) -> Generator[None]:
    """Within the context row b of every batch is under the adapter(s) `rows[b]`, and no other.

    Works in inference and in training, where the adapters named require grad; each row gets what
    it would get alone. Rows are the first axis of every adapted layer's input.

    Args:
        model: a model with adapters.
        rows: for each row an adapter's name, a mixture such as `{"legal": 0.7, "poet": 0.3}`, or
            None for the base.

    Raises:
        ValueError: no rows, a name that the model does not carry, a weight that is not finite.
        RuntimeError: no adapter here, the model is merged, or the adapters named differ in dropout
            in training mode.
    """
    layers = require_layers(model)
    refuse_merged(layers)
    if not isinstance(cast(object, rows), Sequence) or isinstance(rows, str) or not rows:
        raise ValueError("rows must give an adapter (or None) for each row of the batch.")
    names = adapter_names(layers)
    mixtures = [{} if row is None else as_mixture(row, layers) for row in rows]
    routes = [_route(layer, names, mixtures) for layer in layers.values()]
    used = {name for mixture in mixtures for name in mixture}
    before = [(layer, layer.routing, _trained(layer)) for layer in layers.values()]
    for (layer, _, _), route in zip(before, routes, strict=True):
        layer.routing = route
        _train_only(layer, used)
    try:
        yield
    finally:
        for layer, route, trained in before:
            layer.routing = route
            _train_only(layer, trained)


class Routing:
    """The updates that each row of a batch gets in one layer.

    Args:
        bank: the layer's updates by the bank's numbering; None where it has none.
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
        self.frozen = [None if update is None else _without_gradients(update) for update in bank]
        self.some = next(update for update in bank if update is not None)
        self.index, self.scales = index, scales
        self.rank = max(u.factors()[0].shape[0] for u in bank if u is not None)
        self.kept: tuple[list[Any], Tensor, Tensor] | None = None
        if not torch.is_grad_enabled():
            self.factors()

    def __call__(self, x: Tensor) -> Tensor:
        """Map `(B, …, in)`, or token ids `(B, …)`, to what the updates add, `(B, …, out)`."""
        B = len(self.index)
        if x.shape[0] != B:
            raise ValueError(f"The batch has {x.shape[0]} rows, but {B} are routed.")
        a, b = self.factors()  # (B, k·r, in) or for an embedding the bank's, (B, out, k·r)
        if isinstance(self.some, EmbeddingUpdate):
            leading, h = x.shape, self._looked_up(x.reshape(B, -1), a)
        else:
            x = F.dropout(x, self.dropout, self.some.training)
            leading = x.shape[:-1]
            h = x.reshape(B, -1, x.shape[-1]) @ a.to(x.dtype).mT  # (B, -1, k·r)
        h = h * self.scales.to(h.dtype).repeat_interleave(self.rank, 1)[:, None]
        return (h @ b.to(h.dtype).mT).reshape(*leading, b.shape[1])

    def _looked_up(self, ids: Tensor, bank: Tensor) -> Tensor:
        """What `(B, T)` ids select of each row's own Aᵀ, `(B, T, k·r)`, out of all Aᵀ's."""
        h = F.embedding(ids, bank.flatten(0, 1).t())  # (B, T, n·r)
        h = h.reshape(*ids.shape, len(self.bank), self.rank)
        index = self.index[:, None, :, None].expand(-1, h.shape[1], -1, self.rank)
        return h.gather(2, index).flatten(2)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Each row's A's and B's; kept between calls where changes of them can be noticed."""
        if torch.is_grad_enabled():
            return self._gathered(self.bank)
        if torch.compiler.is_compiling():
            return self._gathered(self.frozen)
        parameters = [p for u in self.bank if u is not None for p in (u.A, u.B)]
        if any(p.is_inference() for p in parameters):  # these count no versions
            return self._gathered(self.bank)
        versions = [(p._version, p.data_ptr(), p.dtype) for p in parameters]
        if self.kept is None or self.kept[0] != versions:
            self.kept = (versions, *self._gathered(self.bank))
        return self.kept[1], self.kept[2]

    def _gathered(self, bank: Sequence[LowRankUpdate | None]) -> tuple[Tensor, Tensor]:
        pairs = [None if update is None else update.factors() for update in bank]
        blank = [torch.zeros_like(f) for f in next(p for p in pairs if p is not None)]
        a = torch.stack([self._padded(*(p or blank))[0] for p in pairs])  # (n, r, in)
        b = torch.stack([self._padded(*(p or blank))[1] for p in pairs])  # (n, out, r)
        if not isinstance(self.some, EmbeddingUpdate):
            a = a[self.index].flatten(1, 2)  # (B, k·r, in)
        return a, b[self.index].transpose(1, 2).flatten(2)  # (B, out, k·r)

    def _padded(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        missing = self.rank - a.shape[0]
        return F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))


def _without_gradients(update: LowRankUpdate) -> LowRankUpdate:
    """The update over the same memory, but never trained: compiled code need not ask whether."""
    shadow = copy.copy(update)
    own = {n: nn.Parameter(p.detach(), requires_grad=False) for n, p in update.named_parameters()}
    vars(shadow)["_parameters"] = own
    return shadow


def _route(
    layer: LoRALinear, names: Sequence[str], mixtures: Sequence[Mapping[str, float]]
) -> Routing:
    """The routing of one layer; an adapter that it lacks adds nothing here."""
    bank = [cast(LowRankUpdate | None, dict(layer.updates).get(name)) for name in names]
    here = [update for update in bank if update is not None]
    used = {name for mixture in mixtures for name in mixture}
    dropouts = {
        update.config.dropout
        for name, update in zip(names, bank, strict=True)
        if update is not None and name in used
    }
    if here[0].training and len(dropouts) > 1:
        raise RuntimeError("Adapters that are trained in one batch must have the same dropout.")
    scaling = {
        name: 0.0 if update is None else update.config.scaling
        for name, update in zip(names, bank, strict=True)
    }
    k = max(1, *map(len, mixtures))
    index = [[names.index(n) for n in m] + [0] * (k - len(m)) for m in mixtures]
    scales = [[w * scaling[n] for n, w in m.items()] + [0.0] * (k - len(m)) for m in mixtures]
    device = here[0].A.device
    return Routing(
        bank,
        torch.tensor(index, device=device),
        torch.tensor(scales, device=device, dtype=widest_float(device)),
        max(dropouts, default=0.0),
    )


def _trained(layer: LoRALinear) -> set[str]:
    return {name for name, update in layer.updates.items() if update.A.requires_grad}


def _train_only(layer: LoRALinear, names: set[str]) -> None:
    for name, update in layer.updates.items():
        update.requires_grad_(name in names)
