"""What PyTorch leaves without types or without a public name, with types, in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_torch: Any = torch
_aten: Any = torch.ops.aten


def apply(function: type[torch.autograd.Function], *arguments: object) -> Tensor:
    """Call an autograd function of one output."""
    untyped: Any = function
    return untyped.apply(*arguments)


def unsafe_view(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A new shape that autograd does not take for a view, so that it may be changed in place."""
    return _aten._unsafe_view(tensor, shape)


LinAlgError: type[RuntimeError] = _torch.linalg.LinAlgError
"""What decompositions raise, such as that of a matrix that is not finite."""


def qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.qr`."""
    return _torch.linalg.qr(matrix)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.linalg.svd`, the thin one: u, the singular values, vᵀ."""
    return _torch.linalg.svd(matrix, full_matrices=False)


def in_transform() -> bool:
    """Whether torch.func transforms what runs now."""
    return _torch._C._are_functorch_transforms_active()


def in_backward() -> bool:
    """Whether a backward pass runs now, in which checkpointed layers run again."""
    return _torch._C._current_graph_task_id() != -1


def on_gradient(tensor: Tensor, hook: Callable[[Tensor], None]) -> None:
    """Call the hook with the tensor's gradient when that is known."""
    untyped: Any = tensor
    untyped.register_hook(hook)


def on_state_dict(
    module: nn.Module, *, after: Callable[..., None], before_load: Callable[..., None]
) -> None:
    """Call `after` when a state dict has been made, and `before_load` before one is loaded."""
    untyped: Any = module
    untyped.register_state_dict_post_hook(after)
    untyped.register_load_state_dict_pre_hook(before_load)


def after_load(module: nn.Module, hook: Callable[[nn.Module, object], None]) -> None:
    """Call the hook when a state dict has been loaded into the module."""
    untyped: Any = module
    untyped.register_load_state_dict_post_hook(hook)


def named_modules(module: nn.Module) -> Sequence[tuple[str, nn.Module]]:
    """Every module under every of its paths."""
    untyped: Any = module
    return list(untyped.named_modules(remove_duplicate=False))


def is_sharded(tensor: Tensor) -> bool:
    """Whether several processes hold a part of it each."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, put together where it is sharded; then all processes must ask for it."""
    untyped: Any = tensor
    return untyped.full_tensor() if is_sharded(tensor) else tensor


def is_first(tensors: Iterable[Tensor]) -> bool:
    """Whether this process is the first of those that hold a part of them each, or the only one."""
    return not any(map(is_sharded, tensors)) or _torch.distributed.get_rank() == 0
