"""Many adapters of one model, trained in one batch, each as if it were alone.

A tick is one micro-batch of each slot, in a pass of one shape. Slots with longer examples run in
other passes.

Shapes: k slots · P parameters of a slot · m blocks of a pass, k or 1.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpt2.data.dataset import Dataset
from gpt2.data.order import Integers
from gpt2.fast import devices, head
from gpt2.fast.compiling import blocks_run, compiled
from gpt2.fast.graphs import GraphedCalls
from gpt2.loss import cross_entropies, shifted
from gpt2.model import GPT2, in_mode
from gpt2.population.slots import Batch, Rates, Slot, Streams, adamw, hashes, inputs_of, widths_of
from gpt2.training.config import TrainConfig
from gpt2.training.losses import check_readable, logits_of

ALIGNED = 8  # rows: between, a CPU's product has other last bits
# The fields of a TrainConfig in which slots may differ.
VARYING = "lr epochs steps accumulate schedule warmup_ratio warmup_steps weight_decay betas".split()
VARYING += "eps clip seed".split()


class PopulationTraining:
    """Trainings in the slots of a population.

    Args:
        model: frozen but for the slots.
        slots: what is trained, a `lora.Population`.
        data: the examples.
        config: what all slots have in common.

    Attributes:
        trainings: each slot's training; None where none was started, or to end it.
        moments: AdamW's, `(2, k, P)`.

    Raises:
        ValueError: data, model or config cannot be trained so.
        RuntimeError: the model does not run under the slots.
    """

    def __init__(self, model: nn.Module, slots: Any, data: Dataset, config: TrainConfig) -> None:
        check_readable(model, data)
        faults = [
            f"{name} is for one training alone"
            for name in ("tokens_per_batch", "packing", "checkpointing")
            if getattr(config, name)
        ]
        self._dropping: list[Any] = [m for m in model.modules() if hasattr(m, "drops")]
        for name, module in model.named_modules():
            if isinstance(module, nn.Dropout) and module.p and module not in self._dropping:
                faults.append(f"{name} cannot drop by slots: set its p to 0")
        on_cuda = devices.on_cuda(slots.flat.device)
        if config.cuda_graph and not on_cuda:
            faults.append(f"cuda_graph=True needs a CUDA device, not {slots.flat.device}")
        if faults:
            raise ValueError(f"The population cannot be trained so: {'; '.join(faults)}.")
        check_attached(model, slots)

        self.model = model
        self.slots = slots
        self.data = data
        self.config = config
        self.device = slots.flat.device

        k = len(slots.flat)
        self.trainings: list[Slot | None] = [None] * k
        limit = data.longest
        if isinstance(model, GPT2):
            limit = model.config.block_size
        self.width, self._widths = widths_of(data, k, config.batch_size, limit, self.device)
        learnt = np.sort(data.supervised(np.arange(len(data))))
        self._most_learnt = int(learnt[-config.batch_size :].sum())
        self.moments = slots.flat.new_zeros(2, *slots.flat.shape)

        self._losses = slots.flat.new_zeros(k)  # of the current steps
        self._state = [slots.flat, slots.grad, self.moments, self._losses]
        self.graphs = GraphedCalls() if on_cuda and config.cuda_graph is not False else None
        self._adamw = compiled(adamw) if config.compile else adamw

    def start(
        self,
        slot: int,
        config: TrainConfig,
        *,
        ratios: Mapping[str, float] | None = None,
    ) -> None:
        """Begin a training of what is in a slot.

        Args:
            slot: its number.
            config: as for `gpt2.train`; slots may differ in the fields of `VARYING`.
            ratios: factors of the learning rate by the slots' parts; 1 where none is given.

        Raises:
            ValueError: a config that differs in more; no such part or slot, or an empty one.
        """
        occupant = self.slots.take(slot)  # raises for an empty slot
        state = Slot(data=self.data, config=config, ratios=ratios or {}, occupant=occupant)
        self.go_on(slot, state)

    def advance(self, ticks: int) -> int:
        """Take at most so many micro-batches of each slot; then wait for the device.

        Returns:
            How many were taken: fewer where all slots rest.

        Raises:
            RuntimeError: the model does not run under the slots any more.
        """
        check_attached(self.model, self.slots)
        compiling: Any = nullcontext()
        if self.config.compile:
            blocks: Any = self.model.transformer
            compiling = blocks_run(blocks, compile=True, checkpointing=False)
        drawing = devices.own_generators(self.device)
        taken = list[tuple[Integers, Tensor]]()
        try:
            with in_mode(self.model, training=True), drawing, compiling:
                while len(taken) < ticks and any(s and s.is_under_way for s in self.trainings):
                    taken.append(self._tick())
        finally:
            self.slots.run_under(None)
            for module in self._dropping:
                module.drops = None
            for steps, figures in taken:
                losses, norms = figures.tolist()
                for i, slot in enumerate(self.trainings):
                    if slot and steps[i]:
                        slot.keep(int(steps[i]), losses[i], norms[i])
        return len(taken)

    def state(self, slot: int) -> Slot:
        """A training between two of its steps, to go on with in any slot.

        Raises:
            ValueError: the slot has none, or it is in the middle of a step.
        """
        training = self.trainings[slot]
        if training is None or training.micro:
            raise ValueError(f"Slot {slot} has no training between two steps.")
        return replace(
            training,
            losses=[*training.losses],
            occupant=self.slots.take(slot),
            moments=self.moments[:, slot].to("cpu", copy=True),
        )

    def go_on(self, slot: int, state: Slot) -> None:
        """Put a training into a slot, where it goes on as if it had never moved.

        Arguments and errors as `start`; a ValueError too if it does not fit.
        """
        common = asdict(self.config)
        parts = self.slots.parts
        faults = [
            f"{name} is {value!r} here and {common[name]!r} in all"
            for name, value in asdict(state.config).items()
            if name not in VARYING and value != common[name]
        ]
        faults += [
            f"{name!r} has the ratio {ratio!r}: give {' and '.join(parts)} numbers above 0"
            for name, ratio in state.ratios.items()
            if name not in parts or not 0 < ratio < math.inf
        ]
        if faults:
            raise ValueError(f"Slot {slot} cannot be trained so: {'; '.join(faults)}.")

        moments = torch.empty_like(self.moments[:, slot]).copy_(torch.as_tensor(state.moments))
        self.slots.put(slot, state.occupant)
        self.moments[:, slot] = moments
        self._losses[slot] = 0
        self.trainings[slot] = replace(
            state,
            losses=[*state.losses],
            occupant=None,
            moments=0.0,
        )

    @torch.no_grad()
    def evaluate(self, data: Dataset, batch_size: int = 8) -> list[float]:
        """The mean loss of every slot over all supervised tokens, without dropout.

        Args:
            data: the examples, all of them for each slot.
            batch_size: examples of a slot in a forward pass.

        Raises:
            ValueError: as `gpt2.evaluate`.
            RuntimeError: the model does not run under the slots any more.
        """
        check_readable(self.model, data)
        check_attached(self.model, self.slots)
        k = len(self.trainings)
        total = torch.zeros(k, dtype=torch.float64)
        tokens = 0
        with in_mode(self.model, training=False), devices.own_generators(self.device):
            for start in range(0, len(data), batch_size):
                chosen = data.by_length[::-1][start : start + batch_size]
                width = int(data.lengths[chosen[0]])
                n = int(data.supervised(chosen).sum())
                inputs = inputs_of(data, len(chosen), width, n, [Batch(0, chosen, width)] * k)
                losses = self._summed(*(tensor.to(self.device) for tensor in inputs))
                total += losses.cpu().double()
                tokens += n
        return (total / tokens).tolist()

    def _tick(self) -> tuple[Integers, Tensor]:
        """One micro-batch of each slot: the steps that end and their figures."""
        k = len(self.trainings)
        parts = self.slots.parts
        usual: list[Batch | None] = [None] * k
        passes = [(self.width, usual)]
        rates = np.zeros((len(Rates._fields) + len(parts), k))
        for i, slot in enumerate(self.trainings):
            if slot is None or not slot.is_under_way:
                continue
            batch = slot.next_batch(i, self._widths)
            if batch.width <= self.width:
                usual[i] = batch
            else:
                passes.append((batch.width, [batch]))
            if batch.tokens:
                rates[:, i] = slot.rates(batch.tokens, parts)

        if not any(usual):
            del passes[0]
        for width, batches in passes[:-1]:
            self._run(width, batches)
        numbers = torch.from_numpy(rates).to(self.slots.flat.dtype)
        return rates[0], self._run(*passes[-1], numbers)

    def _run(self, width: int, batches: Sequence[Batch | None], *rates: Tensor) -> Tensor:
        """A pass with a batch for each block, queued on the device."""
        size = self.config.batch_size
        most = -(-min(self._most_learnt, size * width) // ALIGNED) * ALIGNED
        keys = [  # each block's slot, and the halves of its seed
            (batch.slot, batch.seed & 0xFFFFFFFF, batch.seed >> 32) if batch else (i, 0, 0)
            for i, batch in enumerate(batches)
        ]
        inputs = inputs_of(self.data, size, width, most, batches)
        inputs += [torch.tensor(keys), *rates]
        inputs = [devices.copied(tensor, self.device) for tensor in inputs]
        if devices.on_cpu(self.device):
            streams = Streams(batches)
            for module in self._dropping:
                module.drops = streams
        if self.graphs is None:
            return self._pass(*inputs)
        return self.graphs(self._pass, lambda: self._state, *inputs).clone()

    def _pass(
        self,
        idx: Tensor,
        labels: Tensor,
        at: Tensor,
        keys: Tensor,
        rates: Tensor | None = None,
    ) -> Tensor:
        """Add the gradients of blocks; given rates, update the slots whose step ends."""
        slots = self.slots
        if not devices.on_cpu(self.device):
            each = hashes(keys[:, 1:], len(self._dropping))
            for module, drops in zip(self._dropping, each, strict=True):
                module.drops = drops
        slots.run_under(None if len(keys) == len(slots.flat) else keys[:, 0])
        losses = self._summed(idx, labels, at)
        gradients = torch.autograd.grad(losses.sum(), slots.parameters, materialize_grads=True)
        with torch.no_grad():
            for summed, gradient in zip(slots.gradients, gradients, strict=True):
                summed += gradient
            self._losses.index_add_(0, keys[:, 0], losses.to(self._losses.dtype))
            return self._losses if rates is None else self._update(rates)

    def _summed(self, idx: Tensor, labels: Tensor, at: Tensor) -> Tensor:
        """The summed loss of each block, `(m,)`; in training compiled and smoothed."""
        model = self.model
        training = torch.is_grad_enabled()
        smoothing = self.config.label_smoothing if training else 0.0
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.autocast):
            if isinstance(model, GPT2):
                x = model.transformer(idx)
                how: Any = {"compiling": training and self.config.compile, "smoothing": smoothing}
                return head.losses(model.lm_head, x, labels, at, **how)
            logits = logits_of(model, idx).flatten(0, 1)
            losses = cross_entropies(logits, shifted(labels), smoothing)
            return losses.view(len(at), -1).sum(1)

    def _update(self, numbers: Tensor) -> Tensor:
        slots = self.slots
        n = len(Rates._fields)
        rates = Rates(*numbers[:n])
        norm = torch.linalg.vector_norm(slots.grad, dim=1) * rates.share
        figures = torch.stack([self._losses * rates.share, norm])
        ends = rates.step > 0
        is_finite = figures.isfinite().all(0)
        stacks = (slots.flat, slots.grad, *self.moments)
        parts = [[stack[:, columns] for stack in stacks] for columns in slots.parts.values()]
        self._adamw(parts, numbers[n:], norm, ends & is_finite, rates)
        slots.grad.masked_fill_(ends[:, None], 0)
        self._losses.masked_fill_(ends, 0)
        self._losses.masked_fill_(ends & ~is_finite, torch.nan)  # for good
        return figures


def check_attached(model: nn.Module, slots: Any) -> None:
    parameters = {id(parameter) for parameter in model.parameters()}
    if not all(id(parameter) in parameters for parameter in slots.parameters):
        raise RuntimeError(
            "The model does not run under these slots: they were taken off, lend the model out, or "
            "are another model's."
        )
