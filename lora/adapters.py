"""Several adapters on one model: which are there, which are in force."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn

from lora.targets import require_layers


@contextmanager
def disabled(model: nn.Module) -> Generator[None]:
    """Within the context the model computes exactly what its base does, merged or not.

    Raises:
        RuntimeError: no adapter here.
    """
    before = [(layer, layer.enabled) for layer in require_layers(model).values()]
    for layer, _ in before:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in before:
            layer.enabled = enabled
