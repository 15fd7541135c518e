"""Adapters on disk, in PEFT's format: a folder with a config and a safetensors file.

The file's metadata adds probes: a few projections of each base weight and of each update, by which
loading finds an adapter that was made for another base, or factors that were swapped.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from lora import peft_config
from lora.inject import attach, make_update
from lora.layer import (
    LowRankUpdate,
    is_fan_in_fan_out,
    out_in_view,
    why_not_adaptable,
)
from lora.targets import base_modules, require_layers, unwrap

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def save(model: nn.Module, folder: str | Path, *, adapter: str = "default") -> None:
    """Write an adapter as PEFT does; the same adapter gives the same bytes.

    Both files are written beside their places and then renamed, so that after a failure, such as a
    full disk, the adapter that was there before still is.

    Args:
        model: a model that carries the adapter, merged or not.
        folder: created if missing.
        adapter: the adapter's name.

    Raises:
        RuntimeError: the model carries no adapter.
        ValueError: none of this name, or NaN or infinity in its factors.
        OSError: the folder cannot be written.
    """
    layers = {p: la for p, la in require_layers(model).items() if adapter in la.updates}
    if not layers:
        raise ValueError(f"The model carries no adapter {adapter!r}.")
    updates = {p: cast(LowRankUpdate, la.updates[adapter]) for p, la in layers.items()}
    tensors = {
        f"{PREFIX}{path}.lora_{name}.weight": factor.detach().cpu().contiguous()
        for path, update in updates.items()
        for name, factor in update.named_parameters()
    }
    if bad := [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"Not saved: NaN or infinity in {', '.join(bad)}.")
    modules = base_modules(model)
    config = peft_config.dumps(
        {path: update.config for path, update in updates.items()},
        linear_paths=[p for p, m in modules.items() if not why_not_adaptable(m)],
        fan_in_fan_out=any(is_fan_in_fan_out(layer.base) for layer in layers.values()),
        causal_lm=hasattr(unwrap(model), "lm_head"),
        base_name=getattr(unwrap(model), "name_or_path", None),
    )
    metadata = {
        "format": "pt",
        "base": json.dumps({p: _base_probe(la.base) for p, la in layers.items()}),
        "updates": json.dumps({p: _update_probe(u.A, u.B) for p, u in updates.items()}),
    }
    _write(
        Path(folder),
        {WEIGHTS: _with_metadata(to_bytes(tensors), metadata), CONFIG: config.encode()},
    )


def load(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter: str = "default",
    allow_base_mismatch: bool = False,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Put a saved adapter, ours or PEFT's, on the model and make it the active one.

    Args:
        model: the base that the adapter was made for.
        folder: as `save` or PEFT's `save_pretrained` wrote it.
        adapter: the name to give it.
        allow_base_mismatch: accept base weights other than those it was made for.
        dtype: of A and B, as for `lora.inject`.

    Returns:
        The dotted paths of the adapted layers.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: listing all faults: tensors missing, left over, mis-shaped or not finite,
            another base, an unreadable file, features of PEFT that are not supported.
        RuntimeError: the model is merged.
        The model is as it was after any error.
    """
    folder = Path(folder)
    config = peft_config.read(folder / CONFIG)
    tensors, metadata = _read(folder / WEIGHTS)
    modules = base_modules(model)
    wanted = {p for p, m in modules.items() if config.matches(p) and not why_not_adaptable(m)}
    factors, faults = _pair(tensors)
    faults += [f"{path}: no tensors in the file" for path in sorted(wanted - factors.keys())]
    faults += [
        f"{path}: {'not a target of the config' if path in modules else 'no such layer here'}"
        for path in factors
        if path not in wanted
    ]
    updates: dict[str, LowRankUpdate] = {}
    for path in modules:
        if path in wanted and path in factors:
            update = make_update(modules[path], config.update_config(path), dtype)
            try:
                _fill(update, factors[path])
            except ValueError as error:
                faults.append(f"{path}: {error}")
            else:
                updates[path] = update
    if not faults:
        faults = _probe_faults(metadata, updates, modules, allow_base_mismatch)
    if faults:
        raise ValueError(f"{folder} does not fit this model: {'; '.join(faults)}.")
    return attach(unwrap(model), adapter, updates)


def _pair(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """A and B by the path of their layer, and what in the file is neither."""
    factors: dict[str, dict[str, Tensor]] = {}
    faults: list[str] = []
    for key, tensor in tensors.items():
        path, _, name = key.removesuffix(".weight").rpartition(".lora_")
        path = path.removeprefix(PREFIX).removeprefix("module.").replace("_orig_mod.", "")
        if path and name in ("A", "B") and key.endswith(".weight"):
            factors.setdefault(path, {})[name] = tensor
        else:
            faults.append(f"{key}: left over")
    return factors, faults


@torch.no_grad()
def _fill(update: LowRankUpdate, factors: Mapping[str, Tensor]) -> None:
    faults: list[str] = []
    for name, parameter in update.named_parameters():
        tensor = factors.get(name)
        if tensor is None:
            faults.append(f"lora_{name} is missing")
        elif tensor.shape != parameter.shape:
            found, wanted = tuple(tensor.shape), tuple(parameter.shape)
            faults.append(f"lora_{name} is {found}, this layer takes {wanted}")
        elif not torch.isfinite(tensor).all():
            faults.append(f"lora_{name} has NaN or infinite values")
        else:
            parameter.copy_(tensor)
    if faults:
        raise ValueError(", ".join(faults))


def _probe_vectors(n: int) -> Tensor:
    """Four fixed, irregular vectors `(n, 4)`, each with a mean square of about 1."""
    squares = torch.arange(1, n + 1, dtype=torch.float64).square()
    return math.sqrt(2) * torch.stack([torch.sin(squares * k) for k in (0.7, 1.1, 1.3, 1.7)], 1)


def _base_probe(base: nn.Module) -> dict[str, Any]:
    """What tells this base weight from another: its dtype, and projections of its direction."""
    weight = out_in_view(base, base.get_parameter("weight")).detach().cpu().double()
    left, right = _probe_vectors(weight.shape[0]), _probe_vectors(weight.shape[1])
    values = left[:, 0] @ weight @ right / _norm(weight)
    dtype = str(base.get_parameter("weight").dtype).removeprefix("torch.")
    return {"dtype": dtype, "probe": _floats(values)}


def _update_probe(a: Tensor, b: Tensor) -> list[float]:
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    left, right = _probe_vectors(b.shape[0]), _probe_vectors(a.shape[1])
    return _floats((left[:, 0] @ b) @ (a @ right))


def _norm(tensor: Tensor) -> float:
    return math.sqrt(float(tensor.detach().double().square().sum()))


def _floats(vector: Tensor) -> list[float]:
    return [float(value) for value in vector]


def _probe_faults(
    metadata: Mapping[str, str],
    updates: Mapping[str, LowRankUpdate],
    modules: Mapping[str, nn.Module],
    allow_base_mismatch: bool,
) -> list[str]:
    """What the probes in the metadata contradict; PEFT's own files have none."""
    faults: list[str] = []
    made_for: dict[str, Any] = json.loads(metadata.get("base", "{}"))
    other = [
        path
        for path, module in modules.items()
        if path in updates and path in made_for and not _same_base(made_for[path], module)
    ]
    if other and not allow_base_mismatch:
        faults.append(
            f"it was made for another base, whose weights differ in {', '.join(other)} "
            "(allow_base_mismatch=True loads it all the same)"
        )
    for path, probe in json.loads(metadata.get("updates", "{}")).items():
        a, b = updates[path].A, updates[path].B
        slack = 0.01 * _norm(a) * _norm(b) + 1e-30  # the file may have been cast to 16 bits
        if not _close(_update_probe(a, b), probe, slack):
            faults.append(f"{path}: A and B are not the ones that were saved (transposed? edited?)")
    return faults


def _same_base(saved: Mapping[str, Any], base: nn.Module) -> bool:
    """Whether the weights agree to the rounding of the coarser dtype of the two."""
    here = _base_probe(base)
    coarser = max(torch.finfo(getattr(torch, d["dtype"])).eps for d in (saved, here))
    return _close(here["probe"], saved["probe"], max(coarser, 1e-5))


def _close(a: list[float], b: list[float], slack: float) -> bool:
    return all(abs(x - y) <= slack for x, y in zip(a, b, strict=True))


def _with_metadata(safetensors_bytes: bytes, metadata: Mapping[str, str]) -> bytes:
    """Add metadata in sorted order; the library's own order differs from run to run."""
    size = int.from_bytes(safetensors_bytes[:8], "little")
    header = {"__metadata__": metadata, **json.loads(safetensors_bytes[8 : 8 + size])}
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + safetensors_bytes[8 + size :]


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {file.parent} is no adapter folder.")
    try:
        with cast(Any, safe_open(file, framework="pt")) as f:
            return {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is no intact safetensors file: {error}.") from None


def _write(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write all files beside their places, then rename all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as beside:
        for name, data in contents.items():
            with open(Path(beside, name), "wb") as f:
                f.write(data)
                os.fsync(f.fileno())
        for name in contents:
            os.replace(Path(beside, name), folder / name)
