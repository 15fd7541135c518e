"""A model whose weights, gradients and moments are shared out among processes, by torch's FSDP2."""

from __future__ import annotations

from math import ceil
from typing import Any, TypeVar

import torch
from torch import nn

from gpt2.model import GPT2
from gpt2.training.distributed import size

UNITS = 8  # in which blocks are put together: each takes the host some 2 ms a step

Model = TypeVar("Model", bound=nn.Module)


def shard(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Share out the model's parameters among the processes of torch's default group.

    Call it in every process, on a model on the process's own device, after adapters were injected
    and before `gpt2.train`. Some blocks' weights at a time are put together while they run. It is
    the model that is changed, and given back.

    Args:
        model: a GPT-2.
        dtype: what weights are put together and computed with in, their own if none is given:
            bfloat16 halves what is sent, and rounds them as autocast does. Gradients are added up
            in float32 then, and the shared-out weights keep their own dtype.

    Raises:
        ValueError: the model is no GPT-2.
    """
    # Not at the top: they import the compiler, which takes a second.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not isinstance(model, GPT2):
        raise ValueError(f"shard takes a GPT-2, got {type(model).__name__}: see fully_shard.")
    mesh = init_device_mesh(next(model.parameters()).device.type, (size(),))
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    # After each forward pass, so that between two steps there is no parameter that is not sharded.
    how: Any = {"mesh": mesh, "reshard_after_forward": True}
    how |= {"mp_policy": MixedPrecisionPolicy() if dtype is None else narrow}
    blocks = list[nn.Module](model.transformer.h)
    together = ceil(len(blocks) / UNITS)
    for first in range(0, len(blocks), together):
        fully_shard(blocks[first : first + together], **how)
    fully_shard(model, **how)
    return model
