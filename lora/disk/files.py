"""Tensors as bytes: safetensors in and out, reproducible, and read as one version."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lora.disk import strict_json
from lora.messages import cut


def to_bytes(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file; its metadata in sorted order, where the library's differs by run."""
    plain = save(tensors)
    size = int.from_bytes(plain[:8], "little")
    header = {"__metadata__": metadata, **json.loads(plain[8 : 8 + size])}
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + plain[8 + size :]


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, copied, and its metadata.

    The file is opened once and read whole: whoever replaces it meanwhile, header and tensors are
    of one version, and nothing that is done to the file later changes a tensor.

    Raises:
        FileNotFoundError: no such file. ValueError: it is damaged.
    """
    try:
        data = file.read_bytes()
        tensors = load(data)
        header = strict_json.parse(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing: {file.parent} is no adapter folder.") from None
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{file} is no intact safetensors file: {cut(error)}.") from None
    return tensors, cast(dict[str, str], header.get("__metadata__") or {})
