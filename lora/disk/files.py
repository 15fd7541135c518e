"""Bytes on disk: safetensors in and out, reproducible, and in place all together or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def to_bytes(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file; its metadata in sorted order, where the library's differs by run."""
    plain = save(tensors)
    size = int.from_bytes(plain[:8], "little")
    header = {"__metadata__": metadata, **json.loads(plain[8 : 8 + size])}
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + plain[8 + size :]


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {file.parent} is no adapter folder.")
    try:
        with cast(Any, safe_open(file, framework="pt")) as f:
            return {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is no intact safetensors file: {error}.") from None


def write(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write all files beside their places, then rename all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as beside:
        for name, data in contents.items():
            with open(Path(beside, name), "wb") as f:
                f.write(data)
                os.fsync(f.fileno())
        for name in contents:
            os.replace(Path(beside, name), folder / name)
