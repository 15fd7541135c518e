"""Weights in and out of a GPT-2, as safetensors.

Files may use the published names (`h.0.attn.c_attn.weight`) or those that transformers writes
(`transformer.h.0.attn.c_attn.weight`). Nothing is transposed, and nothing is copied unless the
dtype or the device asks for it: the parameters are then the mapped file itself, copy-on-write, so
that training them never changes the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gpt2 import streaming
from gpt2.config import GPT2Config, dump_config, read_config
from gpt2.faults import listed
from gpt2.files import written
from gpt2.hub import CONFIG, WEIGHTS, locate

_HEAD, _TOKENS, _POSITIONS = "lm_head.weight", "transformer.wte.weight", "transformer.wpe.weight"
_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
_HEAD_WIDTH = 64  # in all published sizes

Model = TypeVar("Model", bound=nn.Module)


def load(
    build: Callable[[GPT2Config], Model],
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    dropout: float | None = None,
    mmap: bool = True,
) -> Model:
    """Build a GPT-2 from published weights: in eval mode, every parameter trainable.

    Parameters of the file's own dtype on the CPU are the mapped file: whoever writes into that file
    (as `cp` onto it does) changes the model, and whoever shortens it ends the process. Replacing
    the file by renaming another, as `save` and downloads do, is harmless. `mmap=False` copies.

    Args:
        build: makes the model from its config: `GPT2` or a subclass.
        name: "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl" from the Hub; "demo", the bundled
            small base; a folder, or a .safetensors file, whose config.json lies beside it; else
            "org/repo" on the Hub. A folder called like a published size is "./gpt2".
        dtype: of the parameters; None means float32, whatever the file's.
        device: of the parameters; None means the CPU.
        dropout: in [0, 1), instead of config.json's three (embedding, attention, residual).
        mmap: take the mapped file for the parameters where dtype and device allow it.

    Raises:
        FileNotFoundError: there is no such path or repository, or it holds no safetensors weights.
        ConnectionError: the Hub is out of reach and its cache does not have the files.
        ValueError: listing all faults: a damaged file, tensors missing, left over or mis-shaped,
            a config.json that contradicts the tensors or asks for another architecture. Weights
            that are not finite are found where each is read anyway: copied, cast or moved.

    Without a config.json the sizes are the tensors', dropouts the defaults, and heads 64 wide, as
    in all published sizes.

    Source: the files of openai-community/gpt2 on the Hub.
    """
    dtype = torch.float32 if dtype is None else dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"dtype must be 16, 32 or 64 bits of floating-point, got {dtype}.")
    config, tensors = _checked(build, os.fspath(name), dropout)
    state = {key: t.to(device=device, dtype=dtype, copy=not mmap) for key, t in tensors.items()}
    read = [key for key, tensor in state.items() if tensor is not tensors[key]]
    if spoiled := [key for key in read if not _is_finite(state[key])]:
        raise ValueError(f"{name} holds weights that are not finite as {dtype}: {listed(spoiled)}.")
    model = _unfilled(build, config)
    model.load_state_dict(state | {_HEAD: state[_TOKENS]}, assign=True)
    head, tokens = model.get_submodule("lm_head"), model.get_parameter(_TOKENS)
    head.register_parameter("weight", tokens)
    return model.eval()


def save(model: nn.Module, config: GPT2Config, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors` for transformers, or for `load`.

    The same weights give the same bytes. After a failure, as of a full disk, all is as before.

    Args:
        model: a GPT-2 without anything added; of a sharded one call it in each process.
        config: the model's.
        folder: created if missing.

    Raises:
        RuntimeError: listing the tensors that are not a GPT-2's.
        OSError: the folder cannot be written.
    """
    tensors = model.state_dict(keep_vars=True)
    if tensors.get(_HEAD) is tensors.get(_TOKENS):
        del tensors[_HEAD]  # it is the embedding once more
    if faults := _faults(_expected(type(model), config), tensors):
        raise RuntimeError(
            f"Not saved, since the model is no plain GPT-2: {listed(faults)}. "
            "Fold in or take off what was added to its layers first."
        )
    tensors.pop(_HEAD, None)
    stated = dump_config(config, tensors[_TOKENS].dtype)
    if not streaming.is_written_here(tensors):
        return streaming.write(Path(), tensors, {})
    with written(folder) as beside:
        (beside / CONFIG).write_text(stated, encoding="utf-8")
        return streaming.write(beside / WEIGHTS, tensors, {"format": "pt"})


def _checked(
    build: Callable[[GPT2Config], nn.Module], name: str, dropout: float | None
) -> tuple[GPT2Config, dict[str, Tensor]]:
    """The config and the tensors that `name` stands for, but the head's, if all is well."""
    config_file, weight_files = locate(name)
    tensors, faults = _read(weight_files)
    sizes, missing = _sizes(tensors)
    stated = read_config(config_file) if config_file else _heads(sizes, name)
    faults += missing + [
        f"config.json says {field} {stated[field]}, the tensors say {size}"
        for field, size in sizes.items()
        if stated.get(field, size) != size
    ]
    dropped: dict[str, Any] = {} if dropout is None else dict.fromkeys(_DROPOUTS, dropout)
    try:
        config = GPT2Config(**{**stated, **sizes, **dropped})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
    faults += _faults(_expected(build, config), tensors)
    if faults:
        raise ValueError(f"{name} does not hold a GPT-2 as it should: {listed(faults)}.")
    tensors.pop(_HEAD, None)
    return config, tensors


class _WithoutInit(TorchFunctionMode):
    """Skips `torch.nn.init`, since drawing on the meta device imports the compiler: a second."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def _unfilled(build: Callable[[GPT2Config], Model], config: GPT2Config) -> Model:
    """A model without memory for its parameters."""
    with torch.device("meta"), _WithoutInit():
        return build(config)


def _expected(build: Callable[[GPT2Config], nn.Module], config: GPT2Config) -> dict[str, Tensor]:
    """The tensors of such a model, without memory. One block is built: all are alike."""
    alone = _unfilled(build, replace(config, n_layer=1)).state_dict()
    first = "transformer.h.0."
    blocks = {
        key.replace(first, f"transformer.h.{i}."): tensor
        for i in range(config.n_layer)
        for key, tensor in alone.items()
        if key.startswith(first)
    }
    return {key: tensor for key, tensor in alone.items() if not key.startswith(first)} | blocks


def _read(weight_files: Sequence[Path]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by our names, mapped and not read, and the names that came twice."""
    tensors: dict[str, Tensor] = {}
    twice: list[str] = []
    for file in weight_files:
        try:
            found = load_file(file)
        except SafetensorError as error:
            why = listed([str(error)])
            raise ValueError(f"{file} is damaged or no safetensors file: {why}.") from None
        for key, tensor in found.items():
            name = key if key.startswith("transformer.") or key == _HEAD else f"transformer.{key}"
            if re.fullmatch(r"transformer\.h\.\d+\.attn\.(masked_)?bias", name):
                continue  # the causal mask, which old files carry
            if name in tensors:
                twice.append(f"{key} comes twice")
            tensors[name] = tensor
    return tensors, twice


def _sizes(tensors: Mapping[str, Tensor]) -> tuple[dict[str, int], list[str]]:
    """As many of GPT2Config's fields as the tensors tell, and what the blocks lack.

    Blocks are counted, not believed: a tensor called h.999999999 makes no model of a thousand
    million blocks.
    """
    sizes: dict[str, int] = {}
    if _TOKENS in tensors and tensors[_TOKENS].dim() == 2:
        sizes["vocab_size"], sizes["n_embd"] = tensors[_TOKENS].shape
    if _POSITIONS in tensors and tensors[_POSITIONS].dim() == 2:
        sizes["block_size"] = tensors[_POSITIONS].shape[0]
    matches = [re.match(r"transformer\.h\.([0-9]{1,9})\.", key) for key in tensors]
    found = {int(match[1]) for match in matches if match}
    sizes["n_layer"] = len(found) or 1
    if missing := sorted(set(range(len(found) or 1)) - found):
        return sizes, [f"block transformer.h.{i} is missing" for i in missing]
    return sizes, []


def _heads(sizes: Mapping[str, int], name: str | Path) -> dict[str, int]:
    """`n_head`, which no tensor's shape tells."""
    heads, rest = divmod(sizes.get("n_embd", _HEAD_WIDTH), _HEAD_WIDTH)
    if rest:
        raise ValueError(
            f"{name} has no config.json, and n_embd {sizes['n_embd']} is not a multiple of "
            f"{_HEAD_WIDTH}, so n_head is unknown: put a config.json beside the weights."
        )
    return {"n_head": heads}


def _is_finite(tensor: Tensor) -> bool:
    """Found without memory for a mask as large as the tensor."""
    if tensor.sum().isfinite():  # the fastest look; finite numbers may have a sum that is not
        return True
    return bool(torch.stack([tensor.amin(), tensor.amax()]).isfinite().all())  # NaN is both


def _faults(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """All that keeps `found` from being the weights of a model with the tensors `expected`."""
    faults = [f"{key} is missing" for key in expected if key not in found and key != _HEAD]
    for key, tensor in found.items():
        if key not in expected:
            faults.append(f"{key} is left over")
        elif tensor.shape != expected[key].shape:
            shape, wanted = tuple(tensor.shape), tuple(expected[key].shape)
            faults.append(f"{key} is {shape}, should be {wanted}")
        elif not tensor.is_floating_point():
            faults.append(f"{key} is {tensor.dtype}, should be floating-point")
    head, tokens = found.get(_HEAD), found.get(_TOKENS)
    if not faults and head is not None and tokens is not None and not torch.equal(head, tokens):
        faults.append(f"{_HEAD} differs from {_TOKENS}, and GPT-2 has one weight for both")
    return faults
