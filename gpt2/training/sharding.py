"""A model whose weights, gradients and moments are shared out among processes, by torch's FSDP2."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from gpt2.model import GPT2
from gpt2.training.distributed import size

Model = TypeVar("Model", bound=nn.Module)


def shard(model: Model) -> Model:
    """Share out the model's parameters among the processes of torch's default group.

    Call it in every process, on a model on the process's own device, after adapters were injected
    and before `gpt2.train`. Each block's weights are put together while it runs. It is the model
    that is changed, and given back.

    Raises:
        ValueError: the model is no GPT-2.
    """
    # Not at the top: they import the compiler, which takes a second.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not isinstance(model, GPT2):
        raise ValueError(f"shard takes a GPT-2, got {type(model).__name__}: see fully_shard.")
    mesh = init_device_mesh(next(model.parameters()).device.type, (size(),))
    # After each forward pass, so that between two steps there is no parameter that is not sharded.
    for module in (*model.transformer.h, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return model
