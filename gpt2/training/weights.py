"""Trained weights by name: taken, put back, exchanged for a while."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gpt2.training.distributed import own_part, part_like


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what is trained, or of this process's parts, in the host's memory."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: own_part(p.detach()).to("cpu", copy=True) for name, p in own.items()}


def parts_of(model: nn.Module) -> Callable[[str, Tensor], Tensor]:
    """Of a tensor like the parameter of this name, what this process holds if that is sharded."""
    own = dict(model.named_parameters())
    return lambda name, t: part_like(t, own[name]) if name in own and t.dim() else t


def put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give the parameters of these names these values."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in values:
                own_part(p).copy_(values[name])


@contextmanager
def swapped(model: nn.Module, values: Mapping[str, Tensor]) -> Generator[None]:
    """The parameters of these names have these values within, and their own after."""
    own = trained(model) if values else {}
    try:
        put(model, values)
        yield
    finally:
        put(model, own)
