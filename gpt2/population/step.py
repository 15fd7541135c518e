"""A micro-batch of every slot: losses, gradients, and the update of those whose step is over.

Shapes: k slots · P parameters of a slot · b rows of a slot · T time.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gpt2.config import is_number
from gpt2.fast import devices, head
from gpt2.fast.compiling import blocks_run, compiled
from gpt2.fast.graphs import GraphedCalls
from gpt2.loss import cross_entropies, shifted
from gpt2.model import GPT2
from gpt2.population.adamw import update
from gpt2.population.dropout import Hashes, Streams, places
from gpt2.population.slots import OWN
from gpt2.training.config import TrainConfig, require_config
from gpt2.training.losses import logits_of


class Slots(Protocol):
    """What is trained: k sets of parameters, each under its own equal block of a batch's rows.

    Attributes:
        flat, grad: `(k, P)`, all parameters and their gradients.
        parameters, gradients: views of them, as the model is made of them.
        parts: columns by name, which may learn at rates of their own.
    """

    flat: Tensor
    grad: Tensor
    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor]
    parts: Mapping[str, slice]

    def take(self, slot: int) -> Any:
        """What is in a slot, to be put into any."""
        ...

    def put(self, slot: int, updates: Any) -> None:
        """Give a slot what was taken."""
        ...


class StackStep:
    """Micro-batches of all slots on the device, where nothing is asked of it.

    Args:
        model: runs under the slots.
        slots: what is trained.
        config: what the slots have in common.

    Attributes:
        first, second: `(k, P)`, AdamW's moments.
        ratios: `(k,)` factors of the learning rate, by part.
        failed: booleans `(k,)`, the slots of which a loss or gradient was not finite.
    """

    def __init__(self, model: nn.Module, slots: Slots, config: TrainConfig) -> None:
        self.model, self.slots, self.config = model, slots, config
        self.device, k = slots.flat.device, len(slots.flat)
        self.first, self.second = torch.zeros_like(slots.flat), torch.zeros_like(slots.flat)
        self.ratios = {name: slots.flat.new_ones(k) for name in slots.parts}
        self.failed = torch.zeros(k, dtype=torch.bool, device=self.device)
        self._loss = slots.flat.new_zeros(k)
        self.graphs = GraphedCalls() if devices.on_cuda(self.device) else None
        self._dropping: list[Any] = [m for m in model.modules() if hasattr(m, "drops")]
        shape = (len(self._dropping), k, 2)
        self._seeds = torch.zeros(shape, dtype=torch.int32, device=self.device)
        self._streams = Streams(k) if devices.on_cpu(self.device) else None
        self._update = compiled(update) if config.compile else update

    def begin(self, slot: int, ratios: Mapping[str, float]) -> None:
        """A new training begins in a slot, with factors of the learning rate by part."""
        for tensor in (self.first, self.second, self.slots.grad, self._loss, self.failed):
            tensor[slot] = 0
        for name, factors in self.ratios.items():  # one above the type's largest is infinite
            factors[slot] = torch.tensor(ratios.get(name, 1.0), dtype=torch.float64).to(
                factors.dtype
            )

    def __call__(
        self,
        idx: Tensor,
        labels: Tensor,
        at: Tensor,
        numbers: Tensor,
        seeds: Sequence[int | None],
        sizes: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Loss and gradient norm `(2, k)` so far of each slot's step, still on the device.

        Args:
            idx, labels: `(k·b, T)`.
            at: `(k, S)`, where in its block each slot learns; see `gpt2.fast.head.losses`.
            numbers: `(10, k)`: the fields of `Rates`, then the loss's factor, then 1 where the
                slot's step is over.
            seeds: of each slot's dropout, 64 bits; None for an idle one.
            sizes: rows and columns that each slot fills of its block.
        """
        if self._streams is not None:
            self._streams.begin(seeds, sizes)
        halves = [[(s or 0) & 0xFFFFFFFF, (s or 0) >> 32] for s in seeds]
        keys = torch.tensor(halves, dtype=torch.int64, device="cpu").to(torch.int32)
        inputs = [devices.copied(t, self.device) for t in (idx, labels, at, numbers, keys)]
        if self.graphs is None or self.config.cuda_graph is False:
            return self._micro_batch(*inputs)
        return self.graphs(self._micro_batch, self._state, *inputs).clone()

    def losses(self, idx: Tensor, labels: Tensor, at: Tensor, smoothing: float = 0.0) -> Tensor:
        """The summed loss of each slot, `(k,)`."""
        model = self.model
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.autocast):
            if isinstance(model, GPT2):
                how: Any = {"compiling": self.config.compile, "smoothing": smoothing}
                return head.losses(model.lm_head, model.transformer(idx), labels, at, **how)
            found = logits_of(model, idx).flatten(0, 1)
            return cross_entropies(found, shifted(labels), smoothing).view(len(at), -1).sum(1)

    @contextmanager
    def in_force(self) -> Generator[None]:
        """The model computes as the config says, and drops as the slots do; after as before."""
        before = [module.drops for module in self._dropping]
        with ExitStack() as stack:
            if isinstance(self.model, GPT2):
                how = {"compile": self.config.compile, "checkpointing": False}
                stack.enter_context(blocks_run(self.model.transformer, **how))
            try:
                for i, module in enumerate(self._dropping):
                    module.drops = self._streams or Hashes(self._seeds[i])
                yield
            finally:
                for module, drops in zip(self._dropping, before, strict=True):
                    module.drops = drops

    def _micro_batch(
        self, idx: Tensor, labels: Tensor, at: Tensor, numbers: Tensor, keys: Tensor
    ) -> Tensor:
        slots = self.slots
        if self._streams is None:
            places(keys, self._seeds)
        smoothing = self.config.label_smoothing
        loss = self.losses(idx, labels, at, smoothing) * numbers[-2]
        found = torch.autograd.grad(loss.sum(), slots.parameters, materialize_grads=True)
        with torch.no_grad():
            for sum_so_far, gradient in zip(slots.gradients, found, strict=True):
                sum_so_far += gradient
            self._loss += loss
        norm = torch.linalg.vector_norm(slots.grad, dim=1)
        over = numbers[-1] > 0
        figures = torch.stack([self._loss, norm])
        self.failed |= over & ~figures.isfinite().all(0)
        parts = {
            name: (*(t[:, c] for t in (slots.flat, slots.grad, self.first, self.second)), ratio)
            for (name, c), ratio in zip(slots.parts.items(), self.ratios.values(), strict=True)
        }
        with torch.no_grad():
            self._update(parts, norm, over & ~self.failed, numbers[:-2])
            slots.grad.masked_fill_(over[:, None], 0)
            self._loss.masked_fill_(over, 0)
        return figures

    def _state(self) -> list[Tensor]:
        """All that a micro-batch changes."""
        stacks = [self.slots.flat, self.slots.grad, self.first, self.second]
        return [*stacks, self._loss, self.failed, self._seeds]


def check(model: nn.Module, slots: Slots, config: TrainConfig) -> None:
    """Whether the slots of this model can be trained so.

    Raises:
        ValueError: naming all that a population has not.
        RuntimeError: it does not run under them.
    """
    faults = [
        f"{name} is for one training alone"
        for name in ("tokens_per_batch", "packing", "checkpointing")
        if getattr(config, name)
    ]
    dropping = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Dropout) and module.p and not hasattr(module, "drops")
    ]
    if dropping:
        faults.append(f"{dropping[0]} cannot drop for each slot apart: set its p to 0")
    if config.compile and not isinstance(model, GPT2):
        faults.append("compile=True needs a GPT2")
    if config.cuda_graph and not devices.on_cuda(device := slots.flat.device):
        faults.append(f"cuda_graph=True needs a CUDA device, and the slots are on {device}")
    if faults:
        raise ValueError(f"The population cannot be trained so: {'; '.join(faults)}.")
    check_under(model, slots)


def check_own(
    slot: int,
    config: TrainConfig,
    common: TrainConfig,
    ratios: Mapping[str, float],
    parts: Mapping[str, slice],
) -> None:
    """Whether a slot can be trained so beside the others, who have this in common.

    Raises:
        ValueError: it cannot.
    """
    require_config(config)
    all_have = asdict(common)
    faults = [
        f"{name} is {value!r} here and {all_have[name]!r} in all"
        for name, value in asdict(config).items()
        if name not in OWN and value != all_have[name]
    ]
    faults += [f"there is no part {name!r}" for name in ratios if name not in parts]
    faults += [
        f"the ratio of {name} must be finite and above 0, got {ratio!r}"
        for name, ratio in ratios.items()
        if not (is_number(ratio) and 0 < ratio < math.inf)
    ]
    if faults:
        raise ValueError(f"Slot {slot} cannot be trained so: {'; '.join(faults)}.")


def check_under(model: nn.Module, slots: Slots) -> None:
    """Whether the model runs under these slots: else nothing would be trained, and the base judged.

    Raises:
        RuntimeError: it does not.
    """
    there = {id(parameter) for parameter in model.parameters()}
    if not all(id(parameter) in there for parameter in slots.parameters):
        raise RuntimeError(
            "The model does not run under these slots: they are another model's, were taken off, "
            "or lend the model out at the moment."
        )
