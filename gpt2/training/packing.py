"""Whether a run can lay its documents end to end."""

from __future__ import annotations

import dataclasses
import warnings

from torch import nn

from gpt2.fast.devices import on_cpu
from gpt2.model import GPT2, CausalSelfAttention
from gpt2.training.config import TrainConfig


def settled(model: nn.Module, config: TrainConfig) -> TrainConfig:
    """The config, without packing where that would lose the attention's dropout.

    Raises:
        ValueError: packing for a model that is no GPT-2.
    """
    if not config.packing:
        return config
    if not isinstance(model, GPT2):
        raise ValueError(f"packing takes a GPT-2, and the model is a {type(model).__name__}.")
    p, device = model.config.attn_pdrop, next(model.parameters()).device
    if config.packing == "always" or not p or on_cpu(device):
        return config
    warnings.warn(
        f"The kernel that packing takes on {device.type} has no dropout, and the model's attention "
        f"has {p}: examples of about one length are padded instead. Load the base with dropout=0, "
        'or give packing="always" to train without that dropout.',
        stacklevel=3,
    )
    return dataclasses.replace(config, packing=False)


def undropped(model: nn.Module, config: TrainConfig) -> list[CausalSelfAttention]:
    """The attentions whose dropout the caller gives up for packing."""
    if config.packing != "always" or not isinstance(model, GPT2):
        return []
    layers = [m for m in model.modules() if isinstance(m, CausalSelfAttention)]
    return [] if on_cpu(next(model.parameters()).device) else layers
