"""Several processes that train one model: those of torch's default group, if there is one.

Shapes: R micro-batches of a process · N elements of all trained parameters.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from math import ceil
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gpt2.data.batches import Batch
from gpt2.files import is_sharded
from gpt2.loss import IGNORE
from gpt2.model import GPT2
from gpt2.training.config import TrainConfig

Model = TypeVar("Model", bound=GPT2)
Value = TypeVar("Value")
Trained = Sequence[nn.Parameter]

GATHERED_BYTES = 2**28
"""Bytes of a step's gradients up to which they are added in order."""
UNITS = 8  # groups of a sharded model's blocks: each takes the host 2 ms a step
WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}


def rank() -> int:
    return torch.distributed.get_rank() if _is_in_group() else 0


def size() -> int:
    return torch.distributed.get_world_size() if _is_in_group() else 1


def gathered(value: Value) -> list[Value]:
    """What each process gives, in the order of their numbers."""
    values = [value] * size()
    if size() > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def whole(tensor: Any) -> Tensor:
    """The tensor, gathered if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def faults(model: nn.Module, config: TrainConfig) -> list[str]:
    """What keeps these processes from training the model."""
    classes = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    lines = [
        f"{name} is not trained: give the model in it; torchrun starts processes, FSDP2 shards"
        for name in sorted(WRAPPERS & classes)
    ]
    if config.accumulate % size():
        lines.append(
            f"{size()} processes cannot share the {config.accumulate} micro-batches of a step: "
            f"let {size()} divide accumulate"
        )
    return lines


def shares(batches: Sequence[Batch], *, sharded: bool) -> list[tuple[int, Batch]]:
    """This process's micro-batches of a step, with their numbers.

    A sharded model runs in all processes at once, so each takes as many.
    """
    count, each = len(batches), ceil(len(batches) / size())
    mine = list(enumerate(batches))[rank() * each :][:each]
    if sharded and len(mine) < each:  # at the end of an epoch
        unlearnt = torch.full_like(batches[-1].labels, IGNORE)
        mine += [(count, replace(batches[-1], labels=unlearnt, n_tokens=0))] * (each - len(mine))
    return mine


def adds_in_order(trained: Trained, accumulate: int) -> bool:
    """Whether the gradients of several processes are added as one process adds them."""
    held = accumulate * sum(p.numel() * p.element_size() for p in trained)
    return size() > 1 and not is_sharded(trained[0]) and held <= GATHERED_BYTES


def row(trained: Trained, loss: Tensor) -> Tensor:
    """The gradients taken from the parameters, and the loss, `(N + 1,)`."""
    grads = [p.grad for p in trained if p.grad is not None]
    if lacking := len(trained) - len(grads):
        raise RuntimeError(f"{lacking} trained parameters have no part in the loss: freeze them.")
    for p in trained:
        p.grad = None
    return torch.cat([part.reshape(-1) for part in (*grads, loss)])


def summed(trained: Trained, losses: Sequence[Tensor], count: int, *, in_order: bool) -> Tensor:
    """The step's loss over all processes; its gradients are in the parameters.

    Rows of the `count` micro-batches are added in their order: any number of processes gives the
    same bits.
    """
    if in_order:
        losses = _gathered_rows(trained, losses, count)
    loss = sum(losses, torch.zeros((), device=trained[0].device, dtype=torch.float32))
    if size() == 1 or in_order:
        return loss

    torch.distributed.all_reduce(loss)
    if is_sharded(trained[0]):  # FSDP has shared out the mean of the processes' gradients
        return loss / size()

    for dtype in dict.fromkeys(p.dtype for p in trained):
        alike = [p for p in trained if p.dtype == dtype]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in alike]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        torch.distributed.all_reduce(flat)
        for p, part in zip(alike, flat.split([p.numel() for p in alike]), strict=True):
            p.grad = part.view_as(p)
    return loss


def _gathered_rows(trained: Trained, rows: Sequence[Tensor], count: int) -> Sequence[Tensor]:
    """The losses of all rows, and the sum of their gradients in the parameters."""
    sizes = [p.numel() for p in trained]
    dtype = reduce(torch.promote_types, (p.dtype for p in trained), torch.float32)
    mine = trained[0].new_zeros((ceil(count / size()), sum(sizes) + 1), dtype=dtype)  # (R, N + 1)
    for held, values in zip(mine, rows, strict=False):
        held.copy_(values)

    parts = [torch.empty_like(mine) for _ in range(size())]
    torch.distributed.all_gather(parts, mine)
    every = torch.cat(parts)

    gradients = [
        [g.view_as(p).to(p.dtype) for g, p in zip(one.split(sizes), trained, strict=True)]
        for one in every[:count, :-1]
    ]

    for later in gradients[1:]:
        torch._foreach_add_(gradients[0], later)  # pyright: ignore[reportPrivateImportUsage]
    for p, grad in zip(trained, gradients[0], strict=True):
        p.grad = grad
    return every[:count, -1].unbind()


def shard(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Shard the model's parameters over the processes of torch's default group, by FSDP2.

    Call it in every process after adapters were injected. It changes the model and returns it.

    Args:
        model: a GPT-2, on its device.
        dtype: in which weights are sent and computed with, theirs by default. Gradients are then
            added up in float32, and the sharded weights keep their dtype.
    """
    # Not at the top: they import the compiler, which takes a second.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # So that between two steps each parameter is sharded.
    how: Any = {"reshard_after_forward": True}
    how["mesh"] = init_device_mesh(next(model.parameters()).device.type, (size(),))
    if dtype is not None:
        how["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)

    blocks = list[nn.Module](model.transformer.h)
    together = ceil(len(blocks) / UNITS)
    for first in range(0, len(blocks), together):
        fully_shard(blocks[first : first + together], **how)
    fully_shard(model, **how)
    return model


def like(tensor: Tensor, other: Any) -> Tensor:
    """The tensor, sharded as the other is."""
    if not is_sharded(other) or not tensor.dim():
        return tensor
    from torch.distributed.tensor import distribute_tensor  # a sharded model has imported it

    how: Any = {"device_mesh": other.device_mesh, "placements": other.placements}
    return distribute_tensor(tensor.to(other.device), **how, src_data_rank=None).clone()


def _is_in_group() -> bool:
    group = torch.distributed
    return group.is_available() and group.is_initialized()
