"""Many adapters of one model that run in one batch: each in a slot, all in one stacked tensor.

A slot's parameters are one row of `flat`: the A's of every layer, then the B's. Ranks are padded
to the largest by zeros.

Shapes: k slots · b rows of a slot · r rank, padded · in, out of a layer · P parameters of a slot ·
… any axes between.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from lora.config import LoRAConfig, UpdateConfig, config_of
from lora.injection import attach, build, detach, draw
from lora.layer import LowRankUpdate
from lora.layout import is_hooked, is_plain
from lora.tree import refuse, survey


class StackedLinear(nn.Module):
    """`y = x W + b + s_i · drop(x) A_iᵀ B_iᵀ` for the rows of each slot i, by batched products.

    Args:
        base: the frozen layer, which computes `x W + b`.
        a, b: `(k, r, in)` and `(k, out, r)`.
        dropping: whether any slot may have dropout.

    Attributes:
        slots: `(m,)`, the slot of each block of the rows; None for all k in order.
        scales: `(k,)`, each slot's factor, zero at first.
        rates: `(k,)`, each slot's probability of dropout in training.
        drops: maps the input and the rates to what is kept.
    """

    is_stacked = True
    slots: Tensor | None = None
    drops: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, *, dropping: bool) -> None:
        super().__init__()
        self.base = base
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)
        self.scales, self.rates = a.new_zeros(2, len(a)).unbind()
        self.dropping, self.training = dropping, base.training

    def forward(self, x: Tensor) -> Tensor:
        """Map `(k·b, …, in)` to `(k·b, …, out)`; k is m where `slots` is set."""
        factors = self.A, self.B, self.scales, self.rates
        if self.slots is not None:
            factors = [factor.index_select(0, self.slots) for factor in factors]
        a, b, scales, rates = factors
        y, k = self.base(x), len(a)
        if x.shape[0] % k:
            raise ValueError(f"The batch has {x.shape[0]} rows, which are not {k} equal blocks.")
        drops = self.drops if self.training and self.dropping else None
        rows = x if drops is None else drops(x, rates)
        rows = rows.reshape(k, -1, x.shape[-1])
        h = rows @ a.to(x.dtype).mT  # (k, b·…, r)
        h = (h * scales[:, None, None].to(h.dtype)).to(y.dtype)
        stacked = y.reshape(k, -1, y.shape[-1])
        return torch.baddbmm(stacked, h, b.to(y.dtype).mT).view(y.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A and B are views of `flat`, and are used in any dtype of the input.
        if fn(self.scales).device != self.scales.device:
            raise RuntimeError("Eject the population before you move the model.")
        self.base._apply(fn)
        return self


class Population:
    """k adapters of one model, each under its own equal block of a batch's rows.

    Until `eject` the model is frozen, and block i of the rows runs under slot i, at first empty.

    Args:
        model: a model without adapters, on its device and in its dtype.
        slots: k, how many adapters there is room for.
        config: the largest adapter that there is room for, or its fields as keywords: all layers
            that any may adapt, the largest rank, some dropout if any may have it.
        settings: see `lora.LoRAConfig`.

    Attributes:
        flat: `(k, P)`, all parameters; float32, or float64 beside a base in that.
        grad: `(k, P)`, room for their gradients.
        parameters, gradients: views of them, `(k, r, in)` and `(k, out, r)` of each layer.
        parts: the columns of the A's and of the B's.
        layers: the stacked layers by their path.

    Raises:
        ValueError: a target that is no plain linear layer; and as `lora.inject`.
        RuntimeError: the model carries adapters.
    """

    def __init__(
        self, model: nn.Module, slots: int, config: LoRAConfig | None = None, **settings: Any
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}.")
        self.room = config_of(config, settings)
        self.model, self._tree = model, survey(model)
        if self._tree.adapted:
            raise RuntimeError("The model carries adapters. Take them off with lora.eject.")
        drawn = _low_rank(draw(self._tree, replace(self.room, seed=0)))
        refuse(self._tree.shared_weights(drawn), "{} are one tensor: leave them out (exclude=).")
        bases = {path: self._tree.bases[path] for path in drawn}
        other = [p for p, base in bases.items() if is_hooked(base) or not is_plain(base)]
        refuse(other, "{} have a forward of their own: leave them out (exclude=).")
        self._shapes = {path: (u.A.shape, u.B.shape) for path, u in drawn.items()}
        n_a, n_b = (sum(pair[i].numel() for pair in self._shapes.values()) for i in (0, 1))
        self.parts: Mapping[str, slice] = {"A": slice(0, n_a), "B": slice(n_a, n_a + n_b)}
        like = next(iter(drawn.values())).A
        self.flat = like.new_zeros(slots, n_a + n_b).detach()
        self.grad = torch.zeros_like(self.flat)
        views, gradients = self._views(self.flat), self._views(self.grad)
        self.layers = {
            path: StackedLinear(base, *views[path], dropping=self.room.dropout > 0)
            for path, base in bases.items()
        }
        self.parameters: Sequence[Tensor] = [
            factor for layer in self.layers.values() for factor in (layer.A, layer.B)
        ]
        self.gradients: Sequence[Tensor] = [part for path in bases for part in gradients[path]]
        self._configs: list[dict[str, UpdateConfig]] = [{} for _ in range(slots)]
        self._thawed = [p for p in model.parameters() if p.requires_grad]
        self._install()

    def __len__(self) -> int:
        return len(self.flat)

    def draw(self, slot: int, config: LoRAConfig | None = None, **settings: Any) -> None:
        """Begin a new adapter in a slot, the one that `lora.inject` would draw.

        Args:
            slot: its number.
            config: what the adapter is made of, taken whole.
            settings: or the fields in which it differs from the population's; not the seed.

        Raises:
            ValueError: as `lora.inject`; there is no such slot; no room for the adapter.
        """
        self.put(slot, _low_rank(draw(self._tree, config_of(config, settings, self.room))))

    @torch.no_grad()
    def put(self, slot: int, updates: Mapping[str, LowRankUpdate]) -> None:
        """Give a slot these updates by path, which are copied.

        Raises:
            ValueError: there is no such slot, or no room in it.
        """
        self._check_slot(slot)
        faults: list[str] = []
        for path, update in updates.items():
            if path not in self.layers:
                faults.append(f"{path} is no target of it")
            elif update.config.r > (most := self.layers[path].A.shape[1]):
                faults.append(f"{path} has rank {update.config.r}, at most {most} fits")
            elif update.config.dropout and not self.room.dropout:
                faults.append(f"{path} has dropout, and the population has none (dropout=)")
        refuse(faults, "There is no room in the population: {}.")
        self._configs[slot] = {path: update.config for path, update in updates.items()}
        self.flat[slot], self.grad[slot] = 0, 0
        for path, layer in self.layers.items():
            config = self._configs[slot].get(path)
            layer.scales[slot] = config.scaling if config else 0.0
            layer.rates[slot] = config.dropout if config else 0.0
            if config:
                a, b = updates[path].factors()
                layer.A[slot, : config.r], layer.B[slot, :, : config.r] = a, b

    def take(self, slot: int) -> dict[str, LowRankUpdate]:
        """A copy of a slot's adapter, as updates off the model.

        Raises:
            ValueError: there is no such slot, or it is empty.
        """
        self._check_slot(slot)
        if not self._configs[slot]:
            raise ValueError(f"Slot {slot} is empty.")
        updates: dict[str, LowRankUpdate] = {}
        for path, config in self._configs[slot].items():
            base, layer = self._tree.bases[path], self.layers[path]
            a, b = layer.A[slot, : config.r], layer.B[slot, :, : config.r]
            updates[path] = build(base, config, a, b, dtype=self.flat.dtype)
        return updates

    def clear(self, slot: int) -> None:
        """Empty a slot: its rows run under the base."""
        self.put(slot, {})

    def run_under(self, slots: Tensor | None) -> None:
        """Run block i of the rows under slot `slots[i]`, or with None under slot i."""
        for layer in self.layers.values():
            layer.slots = slots

    @contextmanager
    def adapter(self, slot: int, name: str = "default") -> Generator[nn.Module]:
        """Within, the model carries the slot's adapter alone, as an ordinary one.

        Raises:
            ValueError: there is no such slot, or it is empty.
        """
        updates = self.take(slot)
        self._take_off()
        try:
            attach(survey(self.model), name, updates)
            yield self.model
        finally:
            tree = survey(self.model)
            detach(tree, tree.adapted)
            self._install()

    def eject(self) -> None:
        """Take the population off, for good: the model is the one it was."""
        self._take_off()
        for parameter in self._thawed:
            parameter.requires_grad_(True)

    def _views(self, rows: Tensor) -> dict[str, list[Tensor]]:
        """Each layer's A and B as views of rows `(…, P)`."""
        views: dict[str, list[Tensor]] = {path: [] for path in self._shapes}
        start = 0
        for which in (0, 1):
            for path, pair in self._shapes.items():
                stop = start + pair[which].numel()
                views[path].append(rows[..., start:stop].unflatten(-1, pair[which]))
                start = stop
        return views

    def _take_off(self) -> None:
        if not {*self.model.modules()} & {*self.layers.values()}:
            raise RuntimeError("The population is not on the model.")
        self._tree.replace({path: layer.base for path, layer in self.layers.items()})

    def _install(self) -> None:
        for parameter in self._tree.root.parameters():
            parameter.requires_grad_(False)
        self._tree.replace(self.layers)
        for factor in self.parameters:
            factor.requires_grad_(True)

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < len(self):
            raise ValueError(f"slot must be in 0..{len(self) - 1}, got {slot!r}.")


def _low_rank(modules: Mapping[str, nn.Module]) -> dict[str, LowRankUpdate]:
    updates: dict[str, LowRankUpdate] = {}
    for path, module in modules.items():
        if type(module) is not LowRankUpdate:
            name = type(module).__name__
            raise ValueError(f"{path}: a population takes whole linear layers only, not {name}.")
        updates[path] = module
    return updates
