"""Several processes that train one model: who they are, what each takes, what all have to share.

They are those of torch's default group, if the caller has made one; it is made outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.files import is_sharded
from gpt2.training.config import TrainConfig


def rank() -> int:
    """Which of the processes this one is, counted from 0."""
    return torch.distributed.get_rank() if _is_in_group() else 0


def size() -> int:
    """How many processes there are."""
    return torch.distributed.get_world_size() if _is_in_group() else 1


def gathered(text: str) -> list[str]:
    """What each process gives, in their order."""
    found: list[Any] = [text] * size()
    if size() > 1:
        torch.distributed.all_gather_object(found, text)
    return found


def gathered_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, `(R, …)` to `(W · R, …)`."""
    if size() == 1:
        return rows
    found = rows.new_empty(size() * len(rows), *rows.shape[1:])
    group: Any = torch.distributed  # torch 2.13 renames the function
    gather = getattr(group, "all_gather_single", None) or group.all_gather_into_tensor
    gather(found, rows)
    return found


def strided(items: Sequence[int]) -> list[int]:
    """Every so-manieth of the items; as many for each process, the last for who has none left."""
    each = -(-len(items) // size())
    return [items[min(rank() + k * size(), len(items) - 1)] for k in range(each)]


def interleaved(rows: list[list[float]], device: torch.device) -> list[list[float]]:
    """What the processes found of their `strided` items, in the items' order."""
    if size() == 1:
        return rows
    found = gathered_rows(torch.tensor(rows, dtype=torch.float64, device=device))
    return found.view(size(), len(rows), -1).transpose(0, 1).flatten(0, 1).tolist()


def first_says(what: bool) -> bool:
    """What the first process says."""
    return gathered(str(what))[0] == "True"


def own(count: int) -> range:
    """Which of so many things, in order, are this process's: a run of them."""
    each = -(-count // size())
    return range(min(rank() * each, count), min((rank() + 1) * each, count))


def faults(model: nn.Module, config: TrainConfig) -> list[str]:
    """What keeps these processes from training the model together."""
    count = size()
    if count == 1:
        return []
    found: list[str] = []
    if config.accumulate % count:
        fit = [n for n in range(1, config.accumulate + 1) if config.accumulate % n == 0]
        sizes = ", ".join(map(str, fit[:12]))
        found.append(
            f"{count} processes cannot share the {config.accumulate} micro-batches of a step "
            f"(accumulate): start {sizes} of them, or let {count} divide accumulate"
        )
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    kinds = {type(m) for m in model.modules()}
    if any(issubclass(k, wrappers) or k.__name__ == "FullyShardedDataParallel" for k in kinds):
        found.append(
            "give the model itself or one of torch.distributed.fsdp.fully_shard: "
            "gradients of several processes are added up here"
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    sharded = sum(map(is_sharded, trained))
    if sharded not in (0, len(trained)):
        found.append(f"{sharded} of {len(trained)} trained parameters are sharded: shard the whole")
    if sharded and config.in_order:
        found.append("in_order=True takes a model that is not sharded")
    return found


def _is_in_group() -> bool:
    group = torch.distributed
    return group.is_available() and group.is_initialized()


def whole(tensor: Any) -> Tensor:
    """The tensor itself, put together where several devices hold a part of it each."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def own_part(tensor: Any) -> Tensor:
    """What this process holds of it: all, unless it is sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def part_like(tensor: Tensor, other: Any) -> Tensor:
    """What this process holds of a tensor that is sharded as the other is; all if that is whole."""
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # a sharded model has imported it

    home, mesh = tensor.to(other.device), other.device_mesh
    return distribute_tensor(home, mesh, other.placements, src_data_rank=None).to_local().clone()


def as_part(part: Tensor, other: Any) -> Tensor:
    """A tensor sharded as the other is, of which this is what the process holds."""
    if not is_sharded(other):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part.to(other.device, copy=True),
        other.device_mesh,
        other.placements,
        run_check=False,
        shape=other.shape,
        stride=other.stride(),
    )
