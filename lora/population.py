"""Many adapters of one model that run in one batch: each in a slot, all in one stacked tensor.

A slot's parameters are one row of `flat`, in the same layout for all: the A's of every layer, then
the B's. A layer sees its own columns of it as `(k, r, in)` and `(k, out, r)`, so nothing is stacked
or gathered in a step, and the number of kernels does not depend on k. Ranks are padded to the
largest; padding, and a layer that a slot leaves out, is zero, has a zero gradient and stays zero.

Shapes: k slots · P parameters of a slot · r, in, out of a layer.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor, nn

from lora.building import build, draw
from lora.config import LoRAConfig, UpdateConfig
from lora.injection import attach, eject
from lora.layout import is_plain
from lora.messages import listed
from lora.settings import LoRASettings, config_of
from lora.slices import SlicedUpdate
from lora.stacked import Stack, StackedLinear
from lora.tree import survey, survey_adapted
from lora.undo import all_or_nothing
from lora.updates import LowRankUpdate

Updates = Mapping[str, LowRankUpdate]
"""An adapter off the model: its updates by the path of their layer."""


class Population:
    """k adapters of one model, each under its own equal block of a batch's rows.

    From here to `eject` the model is frozen and runs under all of them: block i of the rows, the
    batch's first axis, under slot i. A slot begins empty, as the base.

    Args:
        model: a model without adapters.
        slots: k, how many adapters there is room for.
        config: the largest adapter that there is room for; or its fields as keywords. Its targets
            are the layers that any may adapt, its r the largest rank, its dropout above zero if
            any may have dropout.
        settings: see `lora.LoRAConfig`.

    Attributes:
        flat: `(k, P)`, all parameters; float32, or float64 beside a base in that.
        grad: `(k, P)`, room for their gradients.
        parameters, gradients: views of them, `(k, r, in)` and `(k, out, r)` of each layer.
        parts: the columns of the A's and of the B's: `{"A": slice, "B": slice}`.
        layers: the stacked layers by their path.

    Raises:
        ValueError: what has no room: an embedding, slices, biases, copies of modules; and as
            `lora.inject`.
        RuntimeError: the model carries adapters. It is as it was after any error.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: int,
        config: LoRAConfig | None = None,
        **settings: Unpack[LoRASettings],
    ) -> None:
        if type(slots) is not int or slots < 1:
            raise ValueError(f"slots must be an integer of at least 1, got {slots!r}.")
        self.room = config_of(config, settings)
        self._tree = survey(model)
        if self._tree.adapted:
            raise RuntimeError(
                "The model carries adapters. Take them off with lora.eject, and put them into "
                "slots with population.adopting."
            )
        self.model = model
        drawn = _low_rank(draw(self._tree, replace(self.room, seed=0)))
        if shared := self._tree.shared_weights(drawn):
            raise ValueError(f"{next(iter(shared))}.weight is shared: leave it out of the targets.")
        if own := [path for path in drawn if not is_plain(self._tree.bases[path])]:
            raise ValueError(f"{own[0]} has a forward of its own: leave it out of the targets.")
        some, drops, bases = next(iter(drawn.values())).A, self.room.dropout > 0, self._tree.bases
        shapes = {path: update.factors() for path, update in drawn.items()}
        self._stack = Stack(slots, shapes, some.dtype, some.device)
        self._configs: list[dict[str, UpdateConfig]] = [{} for _ in range(slots)]
        self.flat, self.grad, self.parts = self._stack.flat, self._stack.grad, self._stack.parts
        self.layers = {
            path: StackedLinear(bases[path], *self._stack.of(self.flat, path), dropping=drops)
            for path in drawn
        }
        self.parameters: Sequence[Tensor] = [
            factor for layer in self.layers.values() for factor in (layer.A, layer.B)
        ]
        self.gradients: Sequence[Tensor] = [
            part for path in drawn for part in self._stack.of(self.grad, path)
        ]
        self._thawed = [p for p in model.parameters() if p.requires_grad]
        with all_or_nothing(self._tree.root.modules()):
            self._install()

    def __len__(self) -> int:
        return len(self.flat)

    def draw(
        self, slot: int, config: LoRAConfig | None = None, **settings: Unpack[LoRASettings]
    ) -> None:
        """Begin a new adapter in a slot, the one that `lora.inject` would draw.

        Raises:
            ValueError: as `lora.inject`; there is no such slot; no room for the adapter.
        """
        self.put(slot, _low_rank(draw(self._tree, config_of(config, settings))))

    @torch.no_grad()
    def put(self, slot: int, updates: Updates) -> None:
        """Give a slot these updates, which are copied.

        Raises:
            ValueError: there is no such slot, or listing what has no room in one.
        """
        self._check_slot(slot)
        if faults := [f for path, update in updates.items() for f in self._misfits(path, update)]:
            raise ValueError(f"There is no room in the population: {listed(faults)}.")
        row = torch.zeros(self.flat.shape[1], dtype=self.flat.dtype)
        for path, update in updates.items():
            for room, factor in zip(self._stack.of(row, path), update.factors(), strict=True):
                room[: factor.shape[0], : factor.shape[1]] = factor
        self.flat[slot] = row.to(self.flat.device)
        self.grad[slot] = 0
        self._configs[slot] = {path: update.config for path, update in updates.items()}
        for path, layer in self.layers.items():
            config = self._configs[slot].get(path)
            layer.scales[slot] = config.scaling if config else 0.0
            layer.rates[slot] = config.dropout if config else 0.0

    def take(self, slot: int) -> dict[str, LowRankUpdate]:
        """A copy of a slot's adapter, as updates off the model.

        Raises:
            ValueError: there is no such slot, or it is empty.
        """
        self._check_slot(slot)
        if not self._configs[slot]:
            raise ValueError(f"Slot {slot} is empty.")
        row, found = self.flat[slot].detach(), dict[str, LowRankUpdate]()
        for path, config in self._configs[slot].items():
            a, b = self._stack.of(row, path)
            own = a[: config.r], b[:, : config.r]
            found[path] = build(self._tree.bases[path], config, *own, dtype=row.dtype)
        return found

    def clear(self, slot: int) -> None:
        """Empty a slot: its rows run under the base."""
        self.put(slot, {})

    @contextmanager
    def adapter(self, slot: int, name: str = "default") -> Generator[nn.Module]:
        """Within, the model carries the slot's adapter alone, as an ordinary one.

        There it can be saved, merged, generated with; the slot is as it was after.

        Raises:
            ValueError: there is no such slot, it is empty, or the name is none.
        """
        updates = self.take(slot)
        with self._lifted():
            attach(survey(self.model), name, updates)
            yield self.model

    @contextmanager
    def adopting(self, slot: int) -> Generator[nn.Module]:
        """Within, the model is the bare base; the adapter that it is given then goes into the slot.

        As in `with population.adopting(3) as model: lora.load(model, folder)`.

        Raises:
            ValueError: there is no such slot; no room for the adapter, or more than one.
            RuntimeError: the model was given none.
        """
        self._check_slot(slot)
        with self._lifted():
            yield self.model
            tree = survey_adapted(self.model)
            if len(tree.adapters) > 1:
                raise ValueError(f"A slot takes one adapter, and {tree.named()}.")
            found = {p: m.updates[tree.adapters[0]] for p, m in tree.adapted.items()}
        self.put(slot, _low_rank(found))

    def eject(self) -> None:
        """Take the population off: the model is, object for object, the one it was; once only."""
        self._take_off()
        for parameter in self._thawed:
            parameter.requires_grad_(True)

    @contextmanager
    def _lifted(self) -> Generator[None]:
        """The model without the population within, whatever is injected taken off after."""
        self._take_off()
        try:
            yield
        finally:
            if survey(self.model).adapted:
                eject(self.model)
            self._install()

    def _take_off(self) -> None:
        if not {*self.model.modules()} & {*self.layers.values()}:
            raise RuntimeError("The population is not on the model: it was taken off before.")
        self._tree.replace({layer.base: layer.base for layer in self.layers.values()})

    def _install(self) -> None:
        for parameter in self._tree.root.parameters():
            parameter.requires_grad_(False)
        self._tree.replace({layer.base: layer for layer in self.layers.values()})
        for factor in self.parameters:
            factor.requires_grad_(True)

    def _check_slot(self, slot: int) -> None:
        if type(slot) is not int or not 0 <= slot < len(self):
            raise ValueError(f"slot must be in 0..{len(self) - 1}, got {slot!r}.")

    def _misfits(self, path: str, update: LowRankUpdate) -> list[str]:
        """What keeps an update out of the room at its path."""
        if path not in self.layers:
            return [f"{path} is no target of it"]
        faults: list[str] = []
        if update.config.r > (most := self.layers[path].A.shape[1]):
            faults.append(f"{path} has rank {update.config.r}, at most {most} fits")
        if update.config.dropout and not self.room.dropout:
            faults.append(f"{path} has dropout, for which the population was not made (dropout=)")
        return faults


def _low_rank(modules: Mapping[str, nn.Module]) -> dict[str, LowRankUpdate]:
    """The modules, if all are plain low-rank updates.

    Raises:
        ValueError: naming the first that is none.
    """
    found: dict[str, LowRankUpdate] = {}
    for path, module in modules.items():
        if type(module) is not LowRankUpdate or module.bias is not None:
            kind = "slices" if isinstance(module, SlicedUpdate) else "embeddings, biases or copies"
            raise ValueError(f"{path}: a population takes no {kind}, only whole linear layers.")
        found[path] = module
    return found
