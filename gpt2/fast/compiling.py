"""Code through torch.compile, and the few lengths that it is compiled for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from torch import Tensor

from gpt2.fast.untyped import checkpointed, compile_static, recompile_limit

VARIANTS = 64  # graphs that may be compiled of one function: a shape and a kind of layer each
PADDED = 32  # lengths of compiled and captured work are multiples of this at least


def bucket(length: int, limit: int) -> int:
    """The length to pad to, at most `limit`.

    Few occur, since each is compiled; none is half as long again as it must be, or 32 longer.
    """
    step = max(PADDED, 2 ** (length - 1).bit_length() // 4)
    return min(limit, -(-length // step) * step)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function through torch.compile, one graph for each set of shapes that it meets."""
    run = compile_static(function)

    @wraps(function)
    def call(*arguments: Any) -> Any:
        # Past its own limit of 8 torch would run the rest uncompiled.
        with recompile_limit(VARIANTS):
            return run(*arguments)

    return call


def through(
    module: Callable[..., Tensor], *inputs: Any, compiling: bool, checkpointing: bool = False
) -> Tensor:
    """`module(*inputs)`, by way of torch.compile and of checkpointing where they are asked for.

    Equal modules, such as the blocks of a model, share what is compiled.
    """
    # Around what is compiled, which would otherwise keep what checkpointing is to drop.
    run = compiled(_call) if compiling else _call
    return checkpointed(run, module, *inputs) if checkpointing else run(module, *inputs)


def _call(module: Callable[..., Tensor], *inputs: Any) -> Tensor:
    return module(*inputs)
