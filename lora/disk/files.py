"""Bytes on disk: safetensors in and out, reproducible, and in place all together or not at all."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import cast

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lora.disk import strict_json
from lora.disk.messages import cut

if sys.platform != "win32":
    import fcntl

_BESIDE = ".saving-"  # how the folders begin in which files wait for their places


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


@contextmanager
def replacing(folder: Path) -> Generator[Path]:
    """A new folder to write files in; they take their places in `folder` when the context ends.

    They take them all together: after an error none has, and two writers do not mix. A reader may
    still meet one new file beside an old one, and so may everyone after a kill at that moment:
    what belongs together has to say so itself. Folders that dead writers left behind go.

    Args:
        folder: created if missing. Files get the mode that the umask says.

    Raises:
        OSError: the folder cannot be written; nothing in it has changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    with _claimed(folder) as beside:
        probe = beside / ".mode"
        probe.touch()
        mode = probe.stat().st_mode & 0o777
        probe.unlink()
        yield beside
        files = sorted(beside.iterdir())
        for file in files:
            file.chmod(mode)  # some libraries write for the owner alone
            _sync(file)
        with _locked(folder):
            for file in files:
                os.replace(file, folder / file.name)
            _sync(folder)


@contextmanager
def _claimed(folder: Path) -> Generator[Path]:
    """A new folder in `folder`, locked as long as its writer lives, so that no one sweeps it."""
    with ExitStack() as stack:
        while True:
            beside = Path(tempfile.mkdtemp(dir=folder, prefix=_BESIDE))
            stack.callback(shutil.rmtree, beside, ignore_errors=True)
            with suppress(FileNotFoundError):
                stack.enter_context(_locked(beside))
                if beside.exists():  # or else it was swept before it was locked
                    break
        yield beside


def _sweep(folder: Path) -> None:
    """Remove what dead writers left behind: a living one holds a lock."""
    if sys.platform == "win32":
        return
    for beside in folder.glob(f"{_BESIDE}*"):
        try:
            handle = os.open(beside, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # another one swept it
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(beside, ignore_errors=True)
        except OSError:  # its writer lives, or this disk knows no locks
            pass
        finally:
            os.close(handle)


@contextmanager
def _locked(folder: Path) -> Generator[None]:
    """Hold the folder's lock, where the disk knows locks; it goes with the process."""
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    """Wait until the disk has it; what a folder holds is a file too, but not on Windows."""
    if sys.platform == "win32" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
