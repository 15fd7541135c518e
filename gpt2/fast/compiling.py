"""Code through torch.compile, and the few lengths that it is compiled for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, cast

import torch

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
    run = cast(Any, torch).compile(function, dynamic=False)

    @wraps(function)
    def call(*arguments: Any) -> Any:
        # Past its own limit of 8 torch would run the rest uncompiled.
        with cast(Any, torch)._dynamo.config.patch(recompile_limit=VARIANTS):
            return run(*arguments)

    return call
