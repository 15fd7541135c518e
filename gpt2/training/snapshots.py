"""A run's state on disk: one file, written beside and moved; the one before is kept.

Tensors are `parameters.NAME`, `moments.KIND.NAME` and `best.NAME`; metadata is a JSON text.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt2.files import gathered, write_tensors
from gpt2.training.distributed import like
from gpt2.training.loop import StepRecord
from gpt2.training.step import RunState

NAME, BEFORE = "snapshot.safetensors", "snapshot-before.safetensors"
NAMES, PART = (NAME, BEFORE), f".{NAME}.part"
FORMAT = 2


@dataclass(frozen=True)
class Snapshot:
    """What is kept of a run."""

    made_of: Mapping[str, str]  # base, data and options, by name
    state: RunState
    record: StepRecord | None  # of its last step, if the caller has not dealt with it
    evaluated: Mapping[int, float]  # validation losses by step
    best: Mapping[str, Tensor]  # the trained parameters of the lowest


def write(folder: Path, snapshot: Snapshot) -> None:
    """Write a snapshot; after an OSError those of before are as they were."""
    state = snapshot.state
    kinds = {"parameters": state.parameters, "moments": state.moments, "best": snapshot.best}
    tensors = {f"{kind}.{n}": t for kind, named in kinds.items() for n, t in named.items()}
    if (whole := gathered(tensors)) is None:
        return  # another process writes
    about = {
        "format": FORMAT,
        "made_of": dict(snapshot.made_of),
        "step": state.step,
        "seconds": state.seconds,
        "record": snapshot.record and asdict(snapshot.record),
        "evaluated": list(snapshot.evaluated.items()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / PART
    try:
        write_tensors(made, whole, {"run": json.dumps(about)})
        if (folder / NAME).exists():
            os.replace(folder / NAME, folder / BEFORE)
        os.replace(made, folder / NAME)
    finally:
        made.unlink(missing_ok=True)


def check(folder: Path) -> None:
    """Raise a FileNotFoundError if there is nothing to resume from."""
    if not any((folder / name).is_file() for name in NAMES):
        raise FileNotFoundError(
            f"{folder} holds no snapshot ({NAME}) to go on from: none was saved there, or the run "
            "came to its end."
        )


def read(folder: Path, parameters: Mapping[str, Tensor] | None = None) -> tuple[Snapshot, str]:
    """The last snapshot that is whole; and what is wrong with a later one, "" for nothing.

    What belongs to a sharded one of these parameters is sharded as it is.

    Raises:
        FileNotFoundError: there is none.
        ValueError: none is whole.
    """
    check(folder)
    faults: list[str] = []
    for file in (folder / name for name in NAMES if (folder / name).is_file()):
        try:
            return _read(file, parameters or {}), "; ".join(faults)
        except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
            faults.append(f"{file} is cut short or damaged ({str(error)[:200]})")
    raise ValueError(f"{'; '.join(faults)}: there is no whole snapshot to go on from.")


def remove(folder: Path) -> None:
    """Take the snapshots away."""
    for name in (*NAMES, PART):
        (folder / name).unlink(missing_ok=True)


def _read(file: Path, parameters: Mapping[str, Tensor]) -> Snapshot:
    tensors: dict[str, dict[str, Tensor]] = {"parameters": {}, "moments": {}, "best": {}}
    opener: Any = safe_open(file, "pt")
    with opener as opened:
        about = json.loads(opened.metadata()["run"])
        for key in list(opened.keys()):
            kind, _, name = key.partition(".")
            of = name.partition(".")[2] if kind == "moments" else name
            tensors[kind][name] = like(opened.get_tensor(key), parameters.get(of))
    if about["format"] == 1:  # of version 0.1
        about |= {"record": None, "made_of": {}}
    elif about["format"] != FORMAT:
        raise ValueError(f"it is of format {about['format']}, and this version reads {FORMAT}")
    best, about["evaluated"] = tensors.pop("best"), dict(about["evaluated"])
    state = RunState(step=about["step"], seconds=about["seconds"], **tensors)
    record = about["record"] and StepRecord(**about["record"])
    return Snapshot(about["made_of"], state, record, about["evaluated"], best)
