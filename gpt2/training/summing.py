"""How the losses and gradients of micro-batches become those of a step, in several processes.

A step is so many micro-batches, wherever they run. The gradients of an adapter are small: those of
each micro-batch are gathered and added in the order of the micro-batches, as one process adds them.
So any number of processes gives the same bits. Large gradients are added up by an all-reduce, in an
order of its own, and those of a sharded model by FSDP.

Shapes: M micro-batches of a step · R of them a process · N elements of all trained parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gpt2.data.batches import Batch
from gpt2.files import is_sharded
from gpt2.loss import IGNORE
from gpt2.training.config import TrainConfig
from gpt2.training.distributed import gathered_rows, own, size

_torch: Any = torch
GATHERED_BYTES = 2**28
"""Bytes of a step's gradients up to which they are added in order by default."""


class Sums(Protocol):
    """How the losses and gradients of micro-batches become those of the step."""

    scale: float  # what each loss is to be multiplied by

    def begin(self, batches: Sequence[Batch]) -> list[tuple[int, Batch]]:
        """Begin a step: this process's micro-batches, with their numbers."""
        ...

    def take(self, row: int, loss: Tensor) -> None:
        """The gradients of the process's micro-batch so and so are there, and its loss."""
        ...

    def total(self) -> Tensor:
        """The step's loss; the parameters have its gradients now."""
        ...

    def state(self) -> list[Tensor]:
        """What `take` changes."""
        ...


def sums(trained: Sequence[nn.Parameter], config: TrainConfig) -> Sums:
    """How these parameters' gradients are added up."""
    if size() == 1:
        return Alone()
    if is_sharded(trained[0]):
        return Sharded(config, trained[0].device)
    held = config.accumulate * sum(p.numel() * p.element_size() for p in trained)
    in_order = held <= GATHERED_BYTES if config.in_order is None else config.in_order
    return (InOrder if in_order else Reduced)(trained, config)


class Alone:
    """One process: autograd adds the gradients up."""

    scale = 1.0

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def begin(self, batches: Sequence[Batch]) -> list[tuple[int, Batch]]:
        """All micro-batches."""
        self.losses = []
        return list(enumerate(batches))

    def take(self, row: int, loss: Tensor) -> None:
        """Keep the loss."""
        self.losses.append(loss)

    def total(self) -> Tensor:
        """The step's loss."""
        return torch.stack(self.losses).sum()

    def state(self) -> list[Tensor]:
        """Nothing that outlives a step."""
        return []


class InOrder:
    """Gradients of each micro-batch gathered, and added as one process adds them.

    Args:
        trained: what is trained; all of it must have a part in each loss.
        config: has the number of micro-batches.
    """

    scale = 1.0

    def __init__(self, trained: Sequence[nn.Parameter], config: TrainConfig) -> None:
        self.trained, self.sizes = trained, [p.numel() for p in trained]
        kind = torch.float32
        for p in trained:
            kind = torch.promote_types(kind, p.dtype)  # which holds each gradient as it is
        shape = (
            config.accumulate // size(),
            sum(self.sizes) + 1,
        )  # (R, N + 1), the loss at the end
        self.rows = torch.zeros(shape, dtype=kind, device=trained[0].device)
        self.count = 0

    def begin(self, batches: Sequence[Batch]) -> list[tuple[int, Batch]]:
        """This process's run of the micro-batches."""
        self.count = len(batches)
        mine = own(self.count)
        if len(mine) < self._used:  # at the end of an epoch
            self.rows.zero_()
        return [(i, batches[i]) for i in mine]

    def take(self, row: int, loss: Tensor) -> None:
        """Move the gradients into the row."""
        grads = [p.grad for p in self.trained]
        if any(grad is None for grad in grads):
            raise RuntimeError(
                f"{grads.count(None)} trained parameters have no part in the loss: freeze them, or "
                "train in one process."
            )
        flat = [grad.reshape(-1) for grad in grads if grad is not None]
        torch.cat([*flat, loss.reshape(1)], out=self.rows[row])
        for p in self.trained:
            p.grad = None

    def total(self) -> Tensor:
        """The step's loss."""
        found = gathered_rows(self.rows[: self._used])[: self.count]  # (M, N + 1)
        added = self._gradients(found[0])
        for row in found[1:]:
            _torch._foreach_add_(added, self._gradients(row))
        for p, grad in zip(self.trained, added, strict=True):
            p.grad = grad
        return found[:, -1].float().contiguous().sum()

    def state(self) -> list[Tensor]:
        """What `take` changes."""
        return [self.rows]

    @property
    def _used(self) -> int:
        return -(-self.count // size())

    def _gradients(self, row: Tensor) -> list[Tensor]:
        own_parts = row[:-1].split(self.sizes)
        return [g.view_as(p).to(p.dtype) for g, p in zip(own_parts, self.trained, strict=True)]


class Reduced:
    """Each process adds up its gradients, and an all-reduce those of all.

    The gradients lie in one tensor a dtype, which is reduced as it is.
    """

    scale = 1.0

    def __init__(self, trained: Sequence[nn.Parameter], config: TrainConfig) -> None:
        self.losses = torch.zeros(config.accumulate // size(), device=trained[0].device)
        self.flat: list[Tensor] = []
        self.views: list[tuple[nn.Parameter, Tensor]] = []
        for _, same in groupby(sorted(trained, key=_dtype), _dtype):
            group = list(same)
            sizes = [p.numel() for p in group]
            self.flat.append(torch.zeros(sum(sizes), dtype=group[0].dtype, device=group[0].device))
            views = self.flat[-1].split(sizes)
            self.views += [(p, v.view_as(p)) for p, v in zip(group, views, strict=True)]

    def begin(self, batches: Sequence[Batch]) -> list[tuple[int, Batch]]:
        """This process's run of the micro-batches."""
        for tensor in self.state():
            tensor.zero_()
        self._give()
        return [(i, batches[i]) for i in own(len(batches))]

    def take(self, row: int, loss: Tensor) -> None:
        """Keep the loss; the gradients are where they should be."""
        self.losses[row].copy_(loss)

    def total(self) -> Tensor:
        """The step's loss."""
        self._give()
        loss = self.losses.sum()
        for tensor in (loss, *self.flat):
            torch.distributed.all_reduce(tensor)
        return loss

    def state(self) -> list[Tensor]:
        """What `take` and the backward pass change."""
        return [self.losses, *self.flat]

    def _give(self) -> None:
        for p, view in self.views:
            p.grad = view


class Sharded:
    """A model of `fully_shard`: its backward passes add up and share out, and take the mean.

    Every process has to run the model as often as any other, so it may get a micro-batch in which
    nothing is learnt.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.scale = float(size())
        self.losses = torch.zeros(config.accumulate // size(), device=device)

    def begin(self, batches: Sequence[Batch]) -> list[tuple[int, Batch]]:
        """This process's run of the micro-batches, as many as any other's."""
        self.losses.zero_()
        mine = [(i, batches[i]) for i in own(len(batches))]
        lacking = -(-len(batches) // size()) - len(mine)
        return mine + [(len(batches), _unlearnt(batches[-1]))] * lacking

    def take(self, row: int, loss: Tensor) -> None:
        """Keep the loss."""
        self.losses[row].copy_(loss)

    def total(self) -> Tensor:
        """The step's loss."""
        loss = self.losses.sum() / self.scale
        torch.distributed.all_reduce(loss)
        return loss

    def state(self) -> list[Tensor]:
        """What `take` changes."""
        return [self.losses]


def _dtype(p: Tensor) -> str:
    return str(p.dtype)


def _unlearnt(batch: Batch) -> Batch:
    return replace(batch, labels=torch.full_like(batch.labels, IGNORE), n_tokens=0)
