"""An adapter's two files: located in a folder or on the Hub, read as bytes, written together."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

if sys.platform != "win32":
    import fcntl

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SAVING = ".saving-"  # how the folder begins in which files wait; a killed save leaves it behind
_OTHER_FORMATS = {
    "adapter_model.bin": "a pickle, which is not read: load it with PEFT and call save_pretrained",
    "adapters.safetensors": "mlx-lm's format, which is not read",
    "pytorch_lora_weights.safetensors": "diffusers' format, which is not read",
}


def locate(name: str | Path) -> tuple[Path, Path]:
    """The config and the weights of a folder, or of "org/repo" on the Hub."""
    folder = Path(name)
    if isinstance(name, str) and not folder.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        from huggingface_hub import hf_hub_download  # not at the top: it takes longer than the rest

        return Path(hf_hub_download(name, CONFIG)), Path(hf_hub_download(name, WEIGHTS))
    if missing := [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]:
        verb = "are" if len(missing) > 1 else "is"
        message = f"{folder}: {' and '.join(missing)} {verb} missing."
        for file, reason in _OTHER_FORMATS.items():
            if (folder / file).exists():
                message = f"{message} There is {file}: {reason}."
        if named := sorted(path.parent for path in folder.glob(f"*/{CONFIG}")):
            message = f"{message} There are adapters in {', '.join(map(str, named))}: name one."
        raise FileNotFoundError(message)
    return folder / CONFIG, folder / WEIGHTS


def to_bytes(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file; its metadata in sorted order, where the library's differs by run."""
    plain = save(tensors)
    size = int.from_bytes(plain[:8], "little")
    header = {"__metadata__": metadata, **json.loads(plain[8 : 8 + size])}
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + plain[8 + size :]


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, copied, and its metadata."""
    data = file.read_bytes()
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(f"{file} is not an intact safetensors file: {error}.") from None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__") or {}


def write(folder: Path, content: Mapping[str, bytes]) -> None:
    """Write files into a folder, which an error, such as a full disk, leaves as it was.

    A kill between two names leaves a `.saving-` folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=SAVING) as beside:
        for name, data in content.items():
            with Path(beside, name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        with _locked(folder):  # of two writers one wins whole
            for name in content:
                os.replace(Path(beside, name), folder / name)


@contextmanager
def _locked(folder: Path) -> Generator[None]:
    """Hold the folder's lock, which goes with the process; Windows has none of a folder."""
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
