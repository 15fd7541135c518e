"""An adapter's value in the files of llama.cpp and of mlx-lm.

Shapes: A `(r, in)`, B `(out, r)`, with the scaling in it.
"""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from lora.algebra import Adapter


def write_gguf(
    value: Adapter, file: Path, architecture: str, name_of: Callable[[str], str]
) -> None:
    """Write an adapter that llama.cpp applies to a model of this architecture.

    Args:
        value: what `lora.algebra.factors` gives.
        file: the GGUF to write.
        architecture: llama.cpp's name of it, such as "gpt2".
        name_of: from a layer's path to llama.cpp's name of it, such as "blk.0.attn_qkv".

    Source: llama.cpp's `llama_adapter_lora_init`, which takes A and B as they are.
    """
    writer = import_module("gguf").GGUFWriter(file, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    # llama.cpp scales each layer by alpha / r; by 1 where alpha is 0.
    ranks = {pair.r for pair in value.values()}
    writer.add_float32("adapter.lora.alpha", max(ranks) if len(ranks) == 1 else 0)
    for path, pair in value.items():
        name = f"{name_of(path)}.weight.lora"
        writer.add_tensor(f"{name}_a", pair.A.float().contiguous().numpy())
        writer.add_tensor(f"{name}_b", pair.B.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_mlx(value: Adapter, folder: Path, n_layer: int, blocks: str) -> None:
    """Write `adapters.safetensors` and `adapter_config.json` as mlx-lm does.

    mlx-lm takes both factors transposed, and has one rank, and one set of layers in its last
    blocks. A lower rank, or a layer that is not adapted, is the same with zeros.

    Args:
        value: what `lora.algebra.factors` gives, of layers in the blocks.
        folder: an empty one.
        n_layer: how many blocks the model has.
        blocks: the path of the list of blocks, such as "transformer.h"; mlx-lm's is "model.h".
    """
    rank = max(pair.r for pair in value.values())
    tensors: dict[str, Tensor] = {}
    keys = set[str]()
    first = n_layer
    for path, pair in value.items():
        number, _, key = path.removeprefix(f"{blocks}.").partition(".")
        keys.add(key)
        first = min(first, int(number))
        name = f"model.{blocks.rpartition('.')[2]}.{number}.{key}"
        more = rank - pair.r
        tensors[f"{name}.lora_a"] = pad(pair.A.T, (0, more)).float().contiguous()
        tensors[f"{name}.lora_b"] = pad(pair.B.T, (0, 0, 0, more)).float().contiguous()
    how = {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)}
    about = {"fine_tune_type": "lora", "num_layers": n_layer - first, "lora_parameters": how}
    (folder / "adapter_config.json").write_text(json.dumps(about, indent=2), "utf-8")
    save_file(tensors, folder / "adapters.safetensors")
