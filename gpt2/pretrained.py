"""Weights in and out of a GPT-2, as safetensors.

Files may use the published names (`h.0.attn.c_attn.weight`), which are written, or those with
transformers' prefix (`transformer.h.0…`). Training never changes the mapped file.
"""

import os
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gpt2.config import SIZES, GPT2Config, dump_config, read_config
from gpt2.files import gathered, listed, read_json, write_tensors, written

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PREFIX, _HEAD, _TOKENS = "transformer.", "lm_head.weight", "transformer.wte.weight"
_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")

Model = TypeVar("Model", bound=nn.Module)


def load(
    cls: type[Model],
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    dropout: float | None = None,
    mmap: bool = True,
) -> Model:
    """Load published weights: a GPT-2 in eval mode, every parameter trainable.

    Parameters of the file's dtype on the CPU are the mapped file: writing into it, as `cp`
    does, changes the model; replacing it, as downloads do, is harmless.

    Args:
        name: "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl" from the Hub; "demo", the bundled
            small base; a folder, or a .safetensors file, with config.json beside it; else
            "org/repo" on the Hub. A folder called like a published size is "./gpt2".
        dtype: of the parameters, also by name as "float16"; None means float32, whatever the
            file's.
        device: of the parameters; None means the CPU.
        dropout: in [0, 1), instead of config.json's three (embedding, attention, residual).
        mmap: False copies the weights in every case.

    Raises:
        FileNotFoundError: there is no such path or repository, or it lacks config.json or weights.
        ConnectionError: the Hub is out of reach and its cache does not have the files.
        ValueError: listing all faults: a damaged file, tensors missing, left over or mis-shaped,
            another architecture; and weights not finite, where each is copied, cast or moved.
    """
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point or wanted.itemsize < 2:
        raise ValueError(f"dtype must be 16, 32 or 64 bits of floating-point, got {dtype}.")
    config_file, weight_files = _locate(os.fspath(name))
    dropouts: dict[str, Any] = {} if dropout is None else dict.fromkeys(_DROPOUTS, dropout)
    model = _unfilled(cls, GPT2Config(**{**read_config(config_file), **dropouts}))
    tensors = _read(weight_files)
    if faults := _faults(model.state_dict(), tensors):
        raise ValueError(f"{name} does not hold a GPT-2 as it should: {listed(faults)}.")
    tensors.pop(_HEAD, None)

    state = {key: t.to(device=device, dtype=wanted, copy=not mmap) for key, t in tensors.items()}
    changed = [key for key, tensor in state.items() if tensor is not tensors[key]]
    extremes = {key: torch.stack(state[key].aminmax()) for key in changed}  # NaN is both
    if spoiled := [key for key, two in extremes.items() if not two.isfinite().all()]:
        raise ValueError(f"{name} has weights that are not finite as {wanted}: {listed(spoiled)}.")
    model.load_state_dict(state | {_HEAD: state[_TOKENS]}, assign=True)
    model.get_submodule("lm_head").register_parameter("weight", model.get_parameter(_TOKENS))
    setattr(model, "name_or_path", str(name))  # noqa: B010 - as in transformers
    return model.eval()


def save(model: Any, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors` for transformers, or for `from_pretrained`.

    The same weights give the same bytes. After an error the folder is as before. Of a sharded
    model call it in each process.

    Raises:
        RuntimeError: listing the tensors that are not a GPT-2's.
        OSError: the folder cannot be written.
    """
    tensors: dict[str, Any] = model.state_dict(keep_vars=True)
    if tensors.get(_HEAD) is tensors.get(_TOKENS):
        del tensors[_HEAD]  # it is the embedding once more
    if faults := _faults(_unfilled(type(model), model.config).state_dict(), tensors):
        raise RuntimeError(
            f"Not saved, since the model is no plain GPT-2: {listed(faults)}. "
            "Merge or remove what was added to its layers first."
        )
    tensors.pop(_HEAD, None)
    if (whole := gathered(tensors)) is None:
        return  # another process writes
    published = {key.removeprefix(_PREFIX): tensor for key, tensor in whole.items()}
    with written(folder) as made:
        stated = dump_config(model.config, whole[_TOKENS].dtype)
        (made / CONFIG).write_text(stated, encoding="utf-8")
        write_tensors(made / WEIGHTS, published, {"format": "pt"})


def _locate(name: str) -> tuple[Path, list[Path]]:
    """The config.json and the safetensors files that a name stands for."""
    folder = Path(str(files("gpt2") / "assets" / "demo") if name == "demo" else name)
    if name in SIZES or not folder.exists():
        folder = _download(name)
    if folder.is_file():
        config, weights = folder.with_name(CONFIG), [folder]
    else:
        config, weights = folder / CONFIG, [folder / WEIGHTS]
        if not weights[0].is_file() and (folder / INDEX).is_file():
            shards = {str(shard) for shard in read_json(folder / INDEX)["weight_map"].values()}
            weights = [folder / Path(shard).name for shard in sorted(shards)]
    if missing := [file.name for file in (config, *weights) if not file.is_file()]:
        raise FileNotFoundError(
            f"{name} lacks {listed(missing)}. Only safetensors are read: "
            "convert a pytorch_model.bin first."
        )
    return config, weights


def _download(name: str) -> Path:
    """The folder in the Hub's cache."""
    repo = f"openai-community/{name}" if name in SIZES else name
    if repo.count("/") != 1:
        raise FileNotFoundError(
            f"There is no folder or file {name!r}. Pass {', '.join(SIZES)}, demo, a folder, "
            "a .safetensors file, or org/repo on the Hub."
        )
    from huggingface_hub import constants, errors, snapshot_download  # slow

    try:
        return Path(snapshot_download(repo, allow_patterns=[CONFIG, "model*.safetensors", INDEX]))
    except errors.LocalEntryNotFoundError:
        lacks = f"the files are not in the cache at {constants.HF_HUB_CACHE}"
        way_out = "Pass the path of a local copy, or 'demo'"
        raise ConnectionError(f"{repo}: the Hub is out of reach and {lacks}. {way_out}.") from None
    except errors.RepositoryNotFoundError:  # gated and private ones too
        lacks = f"no repository of that name that you may read on {constants.ENDPOINT}"
        raise FileNotFoundError(f"There is no folder {repo!r} here, and {lacks}.") from None


def _read(weight_files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors by our names, mapped and not read."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files:
        try:
            mapped = load_file(file)
        except SafetensorError as error:
            reason = listed([str(error)])
            raise ValueError(f"{file} is damaged or no safetensors file: {reason}.") from None
        for key, tensor in mapped.items():
            name = key if key.startswith(_PREFIX) or key == _HEAD else f"{_PREFIX}{key}"
            # But for the causal mask, which old files carry.
            if not re.fullmatch(r"transformer\.h\.\d+\.attn\.(masked_)?bias", name):
                tensors[name] = tensor
    return tensors


def _faults(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """What keeps the given tensors from being the expected weights."""
    faults = [f"{key} is missing" for key in expected if key not in given and key != _HEAD]
    for key, tensor in given.items():
        if key not in expected:
            faults.append(f"{key} is left over")
        elif tensor.shape != expected[key].shape:
            wanted = tuple(expected[key].shape)
            faults.append(f"{key} is {tuple(tensor.shape)}, should be {wanted}")
    head, tokens = given.get(_HEAD), given.get(_TOKENS)
    if not faults and head is not None and tokens is not None and not torch.equal(head, tokens):
        faults.append(f"{_HEAD} differs from {_TOKENS}, and GPT-2 has one weight for both")
    return faults


def _unfilled(build: type[Model], config: GPT2Config) -> Model:
    """A model without memory for its parameters."""
    with torch.device("meta"), _WithoutInit():
        return build(config)


class _WithoutInit(TorchFunctionMode):
    """Skips `torch.nn.init`: drawing on the meta device imports the compiler, a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        skips = getattr(func, "__module__", None) == "torch.nn.init"
        return None if skips else func(*args, **(kwargs or {}))
