"""Optimiser groups as PyTorch writes them: parameters with options."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gpt2.fast import devices
from gpt2.files import listed as listing
from gpt2.training.config import TrainConfig

Groups = Sequence[Mapping[str, Any]]
OPTIONS = ("lr", "weight_decay", "betas", "eps")


def grouped(model: nn.Module, config: TrainConfig, groups: Groups | None) -> list[dict[str, Any]]:
    """The groups with the config's options filled in; one of all parameters by default.

    Raises:
        ValueError: listing parameters in no group, twice, or not trained, and bad options.
    """
    usual = {name: getattr(config, name) for name in OPTIONS}
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    given = [{"params": trained}] if groups is None else listed(groups)
    faults: list[str] = []
    for i, group in enumerate(given):
        options = {name: value for name, value in group.items() if name != "params"}
        unknown = [name for name in options if name not in OPTIONS]
        faults += [f"group {i} has the option {n!r} (known: {', '.join(OPTIONS)})" for n in unknown]
        try:
            replace(config, **{n: value for n, value in options.items() if n in OPTIONS})
        except ValueError as error:
            faults.append(f"group {i}: {error}")
    ids = [id(p) for group in given for p in group["params"]]
    if lacking := [name for i, name in names.items() if i not in ids]:
        faults.append(f"in no group: {', '.join(lacking)}")
    if twice := [name for i, name in names.items() if ids.count(i) > 1]:
        faults.append(f"in two groups: {', '.join(twice)}")
    if strangers := sum(i not in names for i in ids):
        faults.append(f"{strangers} of their parameters are not the model's, or require no grad")

    if faults:
        raise ValueError(f"groups: {listing(faults)}.")
    return [{**usual, **group} for group in given]


_TORCHS: Any = torch.optim.AdamW


class AdamW(torch.optim.AdamW):
    """torch's, whose first call imports no compiler, which takes up to 5 s."""

    add_param_group: Any = inspect.unwrap(_TORCHS.add_param_group)
    zero_grad: Any = inspect.unwrap(_TORCHS.zero_grad)
    step: Any = torch.no_grad()(inspect.unwrap(_TORCHS.step))


def adamw(groups: list[dict[str, Any]], device: torch.device, capturable: bool) -> AdamW:
    """Fused where it can be: one call a group, which no interrupt splits."""
    for group in groups:
        group["initial_lr"] = group["lr"]
        if capturable:  # a tensor, which a captured step reads anew
            group["lr"] = torch.full((), group["lr"], dtype=torch.float32, device=device)
    return AdamW(groups, fused=devices.has_fused_adamw(device), capturable=capturable)


def listed(groups: Groups) -> list[dict[str, Any]]:
    """The groups with their parameters as lists."""
    return [
        {**g, "params": [p] if isinstance(p := g.get("params", ()), nn.Parameter) else list(p)}
        for g in groups
    ]
