"""Code through torch.compile, and the few lengths that it is compiled for."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

VARIANTS = 64  # graphs of one function: a shape and a class of layer each
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
    run = torch.compile(function, dynamic=False)

    @wraps(function)
    def call(*arguments: Any) -> Any:
        # Past its limit of 8 torch would run the rest uncompiled.
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            return run(*arguments)

    return call


@contextmanager
def blocks_run(transformer: Any, *, compile: bool, checkpointing: bool) -> Generator[None]:
    """Within, a GPT-2's blocks and embedding go through torch.compile, its blocks checkpointed.

    Equal blocks share a graph, since the module is an argument.
    """
    methods: list[tuple[Any, str]] = [(block, "forward") for block in transformer.h]
    methods = [*methods * (compile or checkpointing), *[(transformer, "embed")] * compile]

    before = [vars(module).get(name) for module, name in methods]  # a hook of the user's, or None
    try:
        for (module, name), hook in zip(methods, before, strict=True):
            plain = getattr(type(module), name)
            run = hook or partial(compiled(plain) if compile else plain, module)
            if checkpointing and name == "forward":
                # Around compiled code, which would keep what checkpointing is to drop.
                run = partial(checkpoint, run, use_reentrant=False)
            setattr(module, name, run)
        yield
    finally:
        for (module, name), hook in zip(methods, before, strict=True):
            vars(module).pop(name, None)
            if hook is not None:
                setattr(module, name, hook)
