"""Files written together or not at all; faults of a config, and messages of bounded length."""

import json
import os
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors.torch import save_file
from torch import Tensor

SHOWN, LONGEST = 10, 160  # faults that one message lists, and characters of one


def listed(faults: Sequence[str]) -> str:
    """The first faults in one line, "; " between them, then how many more there are."""
    shown = [f if len(f) <= LONGEST else f"{f[: LONGEST - 51]}…{f[-50:]}" for f in faults[:SHOWN]]
    more = len(faults) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number; True and "0.5" are none."""
    return not isinstance(value, bool) and isinstance(value, Real)


def outside(config: object, least: Mapping[str, int], **intervals: str) -> list[str]:
    """What is wrong with a config: integers below their least, numbers outside "[0, 1)" or so.

    A field whose default is None may be None.
    """
    faults: list[str] = []
    for name in (*least, *intervals):
        value = getattr(config, name)
        if value is None and getattr(type(config), name) is None:
            continue
        if name in least and (type(value) is not int or value < least[name]):
            faults.append(f"{name} must be an integer of at least {least[name]}, got {value!r}")
        elif interval := intervals.get(name):
            low, high = map(float, interval[1:-1].split(","))
            if not (is_number(value) and low <= value <= high) or (
                (value == low and interval[0] == "(") or (value == high and interval[-1] == ")")
            ):
                faults.append(f"{name} must be in {interval}, got {value!r}")
    return faults


@contextmanager
def written(folder: str | Path) -> Generator[Path]:
    """An empty folder to write files to, which are then moved to `folder`.

    After an error, such as a full disk, nothing has changed. The first by name is out of the way
    meanwhile: a process that is killed leaves no new config beside old weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as made:
        yield Path(made)
        first, *others = sorted(Path(made).iterdir())
        for file in (first, *others):
            with file.open("rb") as f:
                os.fsync(f.fileno())
        old, before = folder / first.name, Path(made, ".before")
        withdrawn = bool(others) and old.is_file() and old.read_bytes() != first.read_bytes()
        if withdrawn:
            os.replace(old, before)
        try:
            for file in (*others, first):
                os.replace(file, folder / file.name)
        except BaseException:
            if withdrawn and others[0].exists():
                os.replace(before, old)
            raise


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from None


def gathered(tensors: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Whole tensors in the host's memory; None in a process that writes nothing."""
    writes = not any(map(is_sharded, tensors.values())) or torch.distributed.get_rank() == 0
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
        if writes:
            whole[name] = tensor.cpu().contiguous()
    return whole if writes else None


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write and flush a safetensors file; the same tensors give the same bytes."""
    file.touch()
    mode = file.stat().st_mode  # of the umask; the library writes for the owner only
    save_file(tensors, file, metadata)
    file.chmod(mode)
    with file.open("rb") as f:
        os.fsync(f.fileno())


def is_sharded(tensor: object) -> bool:
    """Whether each of several processes holds a part of it."""
    return hasattr(tensor, "full_tensor")
