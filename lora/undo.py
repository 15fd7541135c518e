"""Changes that are made whole or not at all, whatever stops them: an error, or Ctrl-C anywhere."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import nn


@contextmanager
def all_or_nothing(modules: Iterable[nn.Module]) -> Generator[None]:
    """Whatever stops the block, Ctrl-C too, these modules are then as they were before it."""
    undo = remember(modules)
    try:
        yield
    except BaseException:
        undo()
        raise


def remember(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """A function that gives modules back the children, parameters, flags and state of this moment.

    Values are remembered, not copied: all that is kept in a module is replaced and never changed
    in place.
    """
    states = [(module, _state(module)) for module in modules]
    flags = [
        (p, p.data, p.requires_grad)
        for module, _ in states
        for p in module.parameters(recurse=False)
    ]

    def undo() -> None:
        for module, state in states:
            vars(module).update(_state_of(state))
        for parameter, data, flag in flags:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)

    return undo


def _state(module: nn.Module) -> dict[str, object]:
    return _state_of(vars(module))


def _state_of(state: Mapping[str, object]) -> dict[str, object]:
    """A copy that shares no dictionary with the original, so that either may change."""
    return {k: {**cast(Any, v)} if type(v) is dict else v for k, v in state.items()}
