"""Weights in and out of a GPT-2, as safetensors.

Files may use the published names (`h.0.attn.c_attn.weight`) or those that transformers writes
(`transformer.h.0.attn.c_attn.weight`). Nothing is transposed, and nothing is copied unless the
dtype or the device asks for it: the parameters are then the mapped file itself, copy-on-write, so
that training them never changes the file.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gpt2.config import GPT2Config
from gpt2.hub import CONFIG, WEIGHTS, locate, read_json

_HEAD, _TOKENS, _POSITIONS = "lm_head.weight", "transformer.wte.weight", "transformer.wpe.weight"
# GPT2Config's fields by their names in config.json.
_FIELDS = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "n_positions": "block_size",
    "vocab_size": "vocab_size",
    "layer_norm_epsilon": "layer_norm_epsilon",
    "embd_pdrop": "embd_pdrop",
    "attn_pdrop": "attn_pdrop",
    "resid_pdrop": "resid_pdrop",
}
# What else config.json may ask for, with the values that this model answers to.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
_END_OF_TEXT = 50256  # the id that begins and ends a text
_HEAD_WIDTH = 64  # in all published sizes

Model = TypeVar("Model", bound=nn.Module)


def load(
    cls: Callable[[GPT2Config], Model],
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Model:
    """Build a GPT-2 from published weights: in eval mode, every parameter trainable.

    Args:
        cls: `GPT2` or a subclass.
        name: "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl" from the Hub; "demo", the bundled
            small base; a folder, or a .safetensors file, whose config.json lies beside it; else
            "org/repo" on the Hub. A folder called like a published size is "./gpt2".
        dtype: of the parameters; None means float32, whatever the file's.
        device: of the parameters; None means the CPU.

    Raises:
        FileNotFoundError: there is no such path or repository, or it holds no safetensors weights.
        ConnectionError: the Hub is out of reach and its cache does not have the files.
        ValueError: listing all faults: a damaged file, tensors missing, left over or mis-shaped,
            a config.json that contradicts the tensors or asks for another architecture.

    Without a config.json the sizes are the tensors', dropouts the defaults, and heads 64 wide, as
    in all published sizes.

    Source: the files of openai-community/gpt2 on the Hub.
    """
    dtype = torch.float32 if dtype is None else dtype
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating-point, got {dtype}.")
    config_file, weight_files = locate(os.fspath(name))
    tensors, faults = _read(weight_files)
    sizes = _sizes(tensors)
    stated = _read_config(config_file) if config_file else _heads(sizes, name)
    faults += [
        f"config.json says {field} {stated[field]}, the tensors say {size}"
        for field, size in sizes.items()
        if stated.get(field, size) != size
    ]
    model: Any = _unfilled(cls, _config({**stated, **sizes}, name))
    faults += _faults(model.state_dict(), tensors)
    if faults:
        raise ValueError(f"{name} does not hold a GPT-2 as it should: {'; '.join(faults)}.")
    tensors[_HEAD] = tensors[_TOKENS]
    state = {key: tensor.to(device=device, dtype=dtype) for key, tensor in tensors.items()}
    model.load_state_dict(state, assign=True)
    model.lm_head.weight = model.transformer.wte.weight
    model.name_or_path = os.fspath(name)
    return model.eval()


def save(model: Any, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors` for transformers, or for `load`.

    The same weights give the same bytes. Both files are written beside their places and then
    renamed, so that after a failure, such as a full disk, those that were there before still are.

    Args:
        model: a GPT-2 without anything added to its layers.
        folder: created if missing.

    Raises:
        RuntimeError: listing the tensors that are not a GPT-2's.
        OSError: the folder cannot be written.
    """
    state: dict[str, Tensor] = model.state_dict()
    tensors = {key: t.detach().cpu().contiguous() for key, t in state.items()}
    if faults := _faults(_unfilled(cast(Any, type(model)), model.config).state_dict(), tensors):
        raise RuntimeError(
            f"Not saved, since the model is no plain GPT-2: {'; '.join(faults)}. "
            "Fold in or take off what was added to its layers first."
        )
    del tensors[_HEAD]  # it is the embedding once more
    config = _dump_config(model.config, tensors[_TOKENS].dtype)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as beside:
        try:
            save_file(tensors, Path(beside, WEIGHTS), metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / WEIGHTS} cannot be written: {error}.") from None
        Path(beside, CONFIG).write_text(config, encoding="utf-8")
        for file in (WEIGHTS, CONFIG):
            os.replace(Path(beside, file), folder / file)


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


def _unfilled(cls: Callable[[GPT2Config], Model], config: GPT2Config) -> Model:
    """A model without memory for its parameters."""
    with torch.device("meta"), _WithoutInit():
        return cls(config)


def _read(weight_files: Sequence[Path]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by our names, mapped and not read, and the names that came twice."""
    tensors: dict[str, Tensor] = {}
    twice: list[str] = []
    for file in weight_files:
        try:
            found = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or no safetensors file: {error}.") from None
        for key, tensor in found.items():
            name = key if key.startswith("transformer.") or key == _HEAD else f"transformer.{key}"
            if re.fullmatch(r"transformer\.h\.\d+\.attn\.(masked_)?bias", name):
                continue  # the causal mask, which old files carry
            if name in tensors:
                twice.append(f"{key} comes twice")
            tensors[name] = tensor
    return tensors, twice


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """As many of GPT2Config's fields as the tensors tell."""
    sizes: dict[str, int] = {}
    if _TOKENS in tensors and tensors[_TOKENS].dim() == 2:
        sizes["vocab_size"], sizes["n_embd"] = tensors[_TOKENS].shape
    if _POSITIONS in tensors and tensors[_POSITIONS].dim() == 2:
        sizes["block_size"] = tensors[_POSITIONS].shape[0]
    layers = [re.match(r"transformer\.h\.(\d+)\.", key) for key in tensors]
    if found := [int(match[1]) for match in layers if match]:
        sizes["n_layer"] = max(found) + 1
    return sizes


def _heads(sizes: Mapping[str, int], name: str | Path) -> dict[str, int]:
    """`n_head`, which no tensor's shape tells."""
    heads, rest = divmod(sizes.get("n_embd", _HEAD_WIDTH), _HEAD_WIDTH)
    if rest:
        raise ValueError(
            f"{name} has no config.json, and n_embd {sizes['n_embd']} is not a multiple of "
            f"{_HEAD_WIDTH}, so n_head is unknown: put a config.json beside the weights."
        )
    return {"n_head": heads}


def _config(fields: Mapping[str, Any], name: str | Path) -> GPT2Config:
    try:
        return GPT2Config(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


def _read_config(file: Path) -> dict[str, Any]:
    """GPT2Config's fields that config.json states.

    Raises:
        ValueError: listing what it asks for that this model does not do.
    """
    stated = read_json(file)
    accepted = {**_ACCEPTED, "n_inner": (None, 4 * (stated.get("n_embd") or 0))}
    if faults := [
        f"{key} {stated[key]!r} (supported: {' or '.join(map(repr, values))})"
        for key, values in accepted.items()
        if stated.get(key, values[0]) not in values
    ]:
        raise ValueError(f"{file} asks for what this GPT-2 does not do: {'; '.join(faults)}.")
    return {field: stated[key] for key, field in _FIELDS.items() if key in stated}


def _dump_config(config: GPT2Config, dtype: torch.dtype) -> str:
    """config.json, byte for byte the same for the same model."""
    stated = {key: getattr(config, field) for key, field in _FIELDS.items()}
    stated |= {key: values[0] for key, values in _ACCEPTED.items()}
    end = _END_OF_TEXT if config.vocab_size > _END_OF_TEXT else None
    stated |= {
        "architectures": ["GPT2LMHeadModel"],
        "bos_token_id": end,
        "dtype": str(dtype).removeprefix("torch."),
        "eos_token_id": end,
        "n_ctx": config.block_size,
    }
    return json.dumps(stated, indent=2, sort_keys=True) + "\n"


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
