"""Updates onto a model and off it: inject, eject, and what there is to train."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora.layer import LoRALinear, LowRankUpdate, UpdateConfig
from lora.merge import is_merged
from lora.merge import merge as fold
from lora.targets import (
    base_modules,
    find_targets,
    lora_layers,
    named_modules,
    refuse_merged,
    require_layers,
    unwrap,
)


def inject(
    model: nn.Module,
    *,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: str | Sequence[str] = ("c_attn",),
    adapter: str = "default",
    seed: int | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Freeze the model and put a new, trainable low-rank update beside each target layer.

    The new adapter becomes the active one. It leaves the base's outputs as they are until it is
    trained, since B starts at zero.

    Args:
        model: any module that holds `nn.Linear` or Conv1D layers below it.
        r: rank of every update; at most the smaller side of its layer.
        alpha: scaling numerator; an update counts `alpha / r` times.
        dropout: probability in [0, 1) on the input of the updates, in training mode.
        targets: dotted suffixes of module paths, matched on whole segments.
        adapter: the new adapter's name; a model can carry several.
        seed: fixes A of every layer, in whatever order layers are found; None draws one from
            torch's global generator.
        dtype: of A and B; by default the base layer's, but float32 beside a 16-bit base.

    Returns:
        The dotted paths of the adapted layers. A module that stands under several paths is
        adapted once, and each of its paths is given.

    Raises:
        ValueError: an argument out of range, a target that matches no layer, `r` too large, a
            name that is taken.
        RuntimeError: the model is merged.
        The model is as it was after any error.
    """
    model = unwrap(model)
    config = UpdateConfig(r=r, alpha=alpha, dropout=dropout)
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    updates: dict[str, LowRankUpdate] = {}
    for path, base in find_targets(model, targets).items():
        updates[path] = update = make_update(base, config, dtype)
        if not update.A.is_meta:
            update.reset(_generator(seed, path))
    return attach(model, adapter, updates)


def eject(model: nn.Module, *, merge: bool = False) -> list[str]:
    """Take every adapter off the model: each base layer goes back to its place.

    Args:
        model: a model with adapters.
        merge: fold the active updates into the base weights for good first. Without it the model
            is, object for object, the one that was injected.

    Returns:
        The dotted paths of the layers.

    Raises:
        RuntimeError: no adapter here, or the model is merged (unmerge it, or pass `merge=True`).
        ValueError: with `merge=True`, as `lora.merge`.
    """
    layers = require_layers(model)
    merged = is_merged(model)
    if merged and not merge:
        raise RuntimeError("The model is merged. Unmerge it first, or keep it with merge=True.")
    if merge and not merged:
        fold(model)
    for layer in layers.values():
        if layer.merged_weight is not None:
            layer.base.get_parameter("weight").data.copy_(layer.merged_weight)
    for parameter in next(iter(layers.values())).thawed:
        parameter.requires_grad_(True)
    paths = list(lora_layers(model, every_path=True))
    _replace(unwrap(model), {layer: layer.base for layer in layers.values()})
    return paths


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimiser should be given: those that require grad, each once."""
    return [p for p in model.parameters() if p.requires_grad]


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has, a shared tensor counted once."""

    trainable: int
    total: int

    def __str__(self) -> str:
        return (
            f"trainable params: {self.trainable:,} || all params: {self.total:,} || "
            f"trainable%: {100 * self.trainable / max(self.total, 1):.4f}"
        )


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count trainable and all parameters; prints as PEFT's `print_trainable_parameters` does."""
    parameters = list(model.parameters())
    return ParameterCount(
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
    )


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the model would have had it never been injected, merged or not."""
    state: dict[str, Tensor] = unwrap(model).state_dict()
    for path in lora_layers(model, every_path=True):
        for key in [k for k in state if k.startswith(f"{path}.")]:
            tensor = state.pop(key)
            if key.startswith(f"{path}.base."):
                state[path + key.removeprefix(f"{path}.base")] = tensor
    return state


def make_update(
    base: nn.Module, config: UpdateConfig, dtype: torch.dtype | None = None
) -> LowRankUpdate:
    """A new update that fits `base`; A is not drawn yet."""
    weight = LoRALinear(base).weight_out_in
    if dtype is None:
        dtype = weight.dtype if weight.dtype.itemsize > 2 else torch.float32
    out_features, in_features = weight.shape
    update = LowRankUpdate(in_features, out_features, config, dtype=dtype, device=weight.device)
    return update.train(base.training)


def attach(model: nn.Module, adapter: str, updates: Mapping[str, LowRankUpdate]) -> list[str]:
    """Freeze the model, commit the updates to the layers at their paths, and activate them.

    Raises:
        ValueError: a name that is taken or cannot be one, or listing each layer that is too small
            for its rank; nothing is changed.
        RuntimeError: the model is merged; nothing is changed.
    """
    present = lora_layers(model)
    _check_name(adapter, present)
    refuse_merged(present)
    faults = [
        f"{path}: r {u.config.r} is above {min(u.A.shape[1], u.B.shape[0])}, its smaller side"
        for path, u in updates.items()
        if u.config.r > min(u.A.shape[1], u.B.shape[0])
    ]
    if faults:
        raise ValueError("; ".join(faults) + ". Choose a smaller r.")
    thawed = _freeze(model, present)
    modules = base_modules(model)
    new = {modules[path]: LoRALinear(modules[path]) for path in updates if path not in present}
    _replace(model, new)
    layers = lora_layers(model)
    for path, update in updates.items():
        layers[path].updates[adapter] = update
        layers[path].thawed = thawed
    for layer in layers.values():
        layer.activate({adapter: 1.0})
    every = lora_layers(model, every_path=True)
    return [path for path, layer in every.items() if adapter in layer.updates]


def _check_name(adapter: str, present: Mapping[str, LoRALinear]) -> None:
    if not adapter or "." in adapter or hasattr(nn.ModuleDict(), adapter):
        raise ValueError(
            f"{adapter!r} cannot name an adapter: it is empty, has a dot, or is taken "
            "by torch.nn.ModuleDict. Choose another."
        )
    names = sorted({name for layer in present.values() for name in layer.updates})
    if adapter in names:
        raise ValueError(
            f"The model carries an adapter {adapter!r} already; here are: "
            f"{', '.join(names)}. Choose another name, or remove or eject it first."
        )


def _freeze(model: nn.Module, present: Mapping[str, LoRALinear]) -> list[nn.Parameter]:
    """Freeze the base; the list of what was trainable is shared by all adapted layers."""
    thawed = next(iter(present.values())).thawed if present else []
    ours = {id(p) for layer in present.values() for p in layer.updates.parameters()}
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in ours:
            parameter.requires_grad_(False)
            thawed.append(parameter)
    return thawed


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put each value of `new` wherever its key stands."""
    for path, module in named_modules(model, every_path=True):
        if module in new:
            parent, _, name = path.rpartition(".")
            model.get_submodule(parent).register_module(name, new[module])


def _generator(seed: int, path: str) -> torch.Generator:
    """A generator of the layer's own, so that the order of injection does not matter."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
