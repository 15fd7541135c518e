"""Training mode or not, for a while."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Generator[None]:
    """The whole model in one mode within, every module in its own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        if any(mode is not training for _, mode in modes):
            model.train(training)
        yield
    finally:
        for module, mode in modes:
            if module.training is not mode:  # an assignment takes a module longer than a look
                module.training = mode
