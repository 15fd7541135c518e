"""An adapter's two files: located in a folder or on the Hub, read, written together."""

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
SAVING = ".saving-"  # a folder in which files wait; a killed save leaves it
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_OTHER_FORMATS = {
    "adapter_model.bin": "a pickle: load it with PEFT and save it",
    "adapters.safetensors": "mlx-lm's format",
    "pytorch_lora_weights.safetensors": "diffusers' format",
}


def locate(name: str | Path) -> tuple[Path, Path]:
    """The config and the weights of a folder, or of "org/repo" on the Hub."""
    folder = Path(name)
    if isinstance(name, str) and not folder.exists() and _REPOSITORY.fullmatch(name):
        from huggingface_hub import hf_hub_download  # slow

        return Path(hf_hub_download(name, CONFIG)), Path(hf_hub_download(name, WEIGHTS))
    if missing := [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]:
        message = f"{folder} has no {' and no '.join(missing)}."
        for file, format in _OTHER_FORMATS.items():
            if (folder / file).exists():
                message = f"{message} {file} is not read: it is {format}."
        if named := sorted(path.parent for path in folder.glob(f"*/{CONFIG}")):
            message = f"{message} Name one of {', '.join(map(str, named))}."
        raise FileNotFoundError(message)
    return folder / CONFIG, folder / WEIGHTS


def to_bytes(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file, its metadata sorted, where the library's order differs by run."""
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
    """Write files into a folder, which an error leaves as it was."""
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
    """Hold the folder's lock, which goes with the process; Windows has none."""
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
