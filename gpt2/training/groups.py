"""Optimiser groups as PyTorch writes them: parts of the parameters with options of their own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gpt2.fast import devices
from gpt2.training.config import TrainConfig

Groups = Sequence[Mapping[str, Any]]
OPTIONS = ("params", "lr", "weight_decay", "betas", "eps")


def grouped(
    parameters: Mapping[str, nn.Parameter], config: TrainConfig, groups: Groups | None
) -> list[dict[str, Any]]:
    """The groups with all options filled in; one of all parameters where none are given.

    Args:
        parameters: what is trained, by name.
        config: gives the options that a group leaves out.
        groups: as for a torch optimiser, `[{"params": [...], "lr": 1e-3}, ...]`.

    Raises:
        ValueError: listing parameters in no group, twice, or not trained; and options that are
            unknown or out of range.
    """
    usual = {name: getattr(config, name) for name in OPTIONS[1:]}
    if groups is None:
        return [{**usual, "params": list(parameters.values())}]
    full = [{**usual, **group} for group in listed(groups)]
    faults = [fault for i, group in enumerate(full) for fault in _faults(i, group)]
    names = {id(p): name for name, p in parameters.items()}
    given = [id(p) for group in full for p in group["params"]]
    left_out = [name for i, name in names.items() if i not in given]
    twice = [names[i] for i in names if given.count(i) > 1]
    strangers = sum(i not in names for i in given)
    if left_out:
        faults.append(f"in no group: {_few(left_out)}")
    if twice:
        faults.append(f"in two groups: {_few(twice)}")
    if strangers:
        faults.append(f"{strangers} of their parameters are not the model's, or require no grad")
    if faults:
        raise ValueError(f"groups: {'; '.join(faults)}.")
    return full


_TORCHS: Any = torch.optim.AdamW


class AdamW(torch.optim.AdamW):
    """torch's, but for its first call, which imports torch's compiler: up to 5 s for nothing."""

    add_param_group: Any = inspect.unwrap(_TORCHS.add_param_group)
    zero_grad: Any = inspect.unwrap(_TORCHS.zero_grad)
    step: Any = torch.no_grad()(inspect.unwrap(_TORCHS.step))


def adamw(groups: list[dict[str, Any]], device: torch.device, capturable: bool) -> AdamW:
    """Fused where it can be: one call a group, so that an interrupt comes before it or after it."""
    capturable = capturable and devices.on_cuda(device)
    for group in groups:
        group["initial_lr"] = group["lr"]
        if capturable:  # a tensor, so that a captured step reads the rate of the moment
            group["lr"] = torch.full((), group["lr"], dtype=torch.float32, device=device)
    return AdamW(groups, fused=devices.has_fused_adamw(device), capturable=capturable)


def listed(groups: Groups) -> list[dict[str, Any]]:
    """The groups with their parameters as lists, which can be read more than once."""
    single = nn.Parameter
    return [
        {**g, "params": [p] if isinstance(p := g.get("params", ()), single) else list(p)}
        for g in groups
    ]


def _faults(i: int, group: Mapping[str, Any]) -> list[str]:
    faults = [
        f"group {i} has the option {key!r} (known: {', '.join(OPTIONS)})"
        for key in group
        if key not in OPTIONS
    ]
    if not (isinstance(group["lr"], int | float) and 0 < group["lr"] < math.inf):
        faults.append(f"group {i}: lr must be a finite number above 0, got {group['lr']!r}")
    return faults


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
