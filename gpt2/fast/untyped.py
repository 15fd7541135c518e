"""What torch leaves without types, with them: so that no other file casts for a type checker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

_torch: Any = torch


def apply(function: type[torch.autograd.Function], *inputs: Any) -> Tensor:
    """The output of a differentiable function of one output."""
    return cast(Any, function).apply(*inputs)


def backward(loss: Tensor) -> None:
    """Add the loss's gradients to those of the parameters."""
    cast(Any, loss).backward()


def gradients(loss: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The loss's gradient for each of the tensors, zeros for one that has no part in it."""
    return _torch.autograd.grad(loss, tensors, materialize_grads=True)


def checkpointed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """What the function gives; the backward pass computes again what it would have kept."""
    return cast(Tensor, checkpoint(function, *inputs, use_reentrant=False))


def compile_static(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function through torch.compile, a graph for each shape."""
    return _torch.compile(function, dynamic=False)


def recompile_limit(graphs: int) -> AbstractContextManager[None]:
    """Lets torch.compile make so many graphs of one function within."""
    return _torch._dynamo.config.patch(recompile_limit=graphs)


def attend_apart(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Causal attention within each document of a row, all `(1, H, T, D)`; by a GPU's kernel."""
    from torch.nn.attention.varlen import varlen_attn  # it imports the compiler: a second

    flat = [t[0].transpose(0, 1) for t in (q, k, v)]  # (T, H, D)
    causal = (-1, 0)
    run = cast(Callable[..., Tensor], varlen_attn)
    return run(*flat, starts, starts, longest, longest, window_size=causal).transpose(0, 1)[None]


def is_transforming() -> bool:
    """Whether `torch.func.grad`, `vmap` or the like is running the code."""
    return _torch._C._are_functorch_transforms_active()


def new_cuda_graph() -> Any:
    """An empty `torch.cuda.CUDAGraph`."""
    return _torch.cuda.CUDAGraph()


def forget_cublas_scratch() -> None:
    """Drop the scratch memory of cuBLAS, which it then allocates anew."""
    _torch._C._cuda_clearCublasWorkspaces()


def add_each(to: list[Tensor], more: list[Tensor]) -> None:
    """Add each of `more` to its tensor of `to`, in one call."""
    _torch._foreach_add_(to, more)


def collectives() -> Any:
    """`torch.distributed`."""
    return _torch.distributed


def gather_into(found: Tensor, own: Tensor) -> None:
    """Put what each process has into `found`, one after another."""
    group = _torch.distributed  # torch 2.13 renames it
    gather = getattr(group, "all_gather_single", None) or group.all_gather_into_tensor
    gather(found, own)


def row_norms(tensor: Tensor) -> Tensor:
    """The Euclidean norm of each row of a `(k, P)` tensor."""
    return _torch.linalg.vector_norm(tensor, dim=1)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, put together where several devices hold a part of it each."""
    return cast(Any, tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of it: all, unless it is sharded."""
    return cast(Any, tensor).to_local() if hasattr(tensor, "to_local") else tensor


def part_like(tensor: Tensor, other: Tensor) -> Tensor:
    """What this process holds of a tensor that is sharded as the other is; all if that is whole."""
    if not hasattr(other, "to_local"):
        return tensor
    how: Any = other
    place, home = _torch.distributed.tensor.distribute_tensor, tensor.to(other.device)
    return place(home, how.device_mesh, how.placements, src_data_rank=None).to_local().clone()


def as_part(part: Tensor, other: Tensor) -> Tensor:
    """A tensor sharded as the other is, of which this is what the process holds."""
    if not hasattr(other, "to_local"):
        return part
    how: Any = other
    return _torch.distributed.tensor.DTensor.from_local(
        part.to(other.device, copy=True),
        how.device_mesh,
        how.placements,
        run_check=False,
        shape=other.shape,
        stride=other.stride(),
    )


def parts(tensor: Tensor, sizes: list[int]) -> list[Tensor]:
    """A `(N,)` tensor in runs of these sizes, each a view of it."""
    return list(cast(Any, tensor).split(sizes))


def floats(tensor: Tensor) -> list[float]:
    """The numbers of a `(N,)` tensor; the host waits for the device."""
    return cast(Any, tensor).tolist()


def table(tensor: Tensor) -> list[list[float]]:
    """The numbers of an `(N, M)` tensor, row by row; the host waits for the device."""
    return cast(Any, tensor).tolist()


def integers(tensor: Tensor) -> list[int]:
    """The numbers of a `(N,)` tensor of integers; the host waits for the device."""
    return cast(Any, tensor).tolist()


def from_numpy(array: Any) -> Tensor:
    """A tensor of the array's memory."""
    return _torch.from_numpy(array)


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by their path, the model itself as ""."""
    return dict(cast(Any, model).named_modules())


def children(module: nn.Module) -> dict[str, nn.Module | None]:
    """The modules that a module holds, by name."""
    return vars(module)["_modules"]
