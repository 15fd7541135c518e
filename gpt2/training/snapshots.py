"""A run's state on disk: one file, written beside, flushed and moved; the one before is kept.

A file holds, beside its tensors (`parameters.NAME`, `moments.KIND.NAME`, `best.NAME`), one JSON
text in its metadata: what the run was made of, the step, what was found on the validation data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt2.files import gathered, write_tensors
from gpt2.training.run import RunState

NAME, BEFORE = "snapshot.safetensors", "snapshot-before.safetensors"
NAMES, PART = (NAME, BEFORE), f".{NAME}.part"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What is kept of a run.

    Args:
        made_of: base, data and options, by name, each as a short text.
        state: where the run is.
        evaluated: the validation loss after some steps, in their order.
        best: the trained parameters of the lowest of them.
    """

    made_of: Mapping[str, str]
    state: RunState
    evaluated: Mapping[int, float]
    best: Mapping[str, Tensor]


def write(folder: Path, snapshot: Snapshot) -> None:
    """Write a snapshot; after an error, such as a full disk, those of before are as they were.

    Raises:
        OSError: it cannot be written.
    """
    state = snapshot.state
    tensors = {f"parameters.{n}": t for n, t in state.parameters.items()}
    tensors |= {f"moments.{n}": t for n, t in state.moments.items()}
    tensors |= {f"best.{n}": t for n, t in snapshot.best.items()}
    about = {
        "format": FORMAT,
        "made_of": dict(snapshot.made_of),
        "step": state.step,
        "seconds": state.seconds,
        "untold": state.untold,
        "evaluated": list(snapshot.evaluated.items()),
    }
    if (whole := gathered(tensors)) is None:
        return  # another process writes
    made = folder / PART
    try:
        write_tensors(made, whole, {"run": json.dumps(about)})
        if (folder / NAME).exists():
            os.replace(folder / NAME, folder / BEFORE)
        os.replace(made, folder / NAME)
    finally:
        made.unlink(missing_ok=True)


def check(folder: Path) -> None:
    """Find out whether there is anything to go on from.

    Raises:
        FileNotFoundError: there is not.
    """
    if not any((folder / name).is_file() for name in NAMES):
        raise FileNotFoundError(
            f"{folder} holds no snapshot ({NAME}) to go on from: none was saved there, or the run "
            "came to its end."
        )


def read(
    folder: Path, part: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
) -> tuple[Snapshot, str]:
    """The last snapshot that is whole; and what is wrong with a later one, "" for nothing.

    Args:
        folder: where it is.
        part: given a parameter's name and a tensor like it, what is to be kept of that; by
            default all.

    Raises:
        FileNotFoundError: there is none.
        ValueError: none is whole.
    """
    check(folder)
    faults: list[str] = []
    for file in (folder / name for name in NAMES):
        if not file.is_file():
            continue
        try:
            return _read(file, part), "; ".join(faults)
        except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
            faults.append(f"{file} is cut short or damaged ({str(error)[:200]})")
    raise ValueError(f"{'; '.join(faults)}: there is no whole snapshot to go on from.")


def remove(folder: Path) -> None:
    """Take the snapshots away."""
    for name in (*NAMES, PART):
        (folder / name).unlink(missing_ok=True)


def _read(file: Path, part: Callable[[str, Tensor], Tensor]) -> Snapshot:
    tensors: dict[str, dict[str, Tensor]] = {"parameters": {}, "moments": {}, "best": {}}
    with cast(Any, safe_open(file, "pt")) as opened:
        about: Any = json.loads(cast(dict[str, str], opened.metadata() or {})["run"])
        for key in cast(list[str], opened.keys()):
            kind, _, name = key.partition(".")
            of = name.partition(".")[2] if kind == "moments" else name
            tensors[kind][name] = part(of, opened.get_tensor(key))
    if about["format"] != FORMAT:
        raise ValueError(f"it is of format {about['format']}, and this version reads {FORMAT}")
    state = RunState(
        step=about["step"],
        seconds=about["seconds"],
        untold=[tuple(row) for row in about["untold"]],
        parameters=tensors["parameters"],
        moments=tensors["moments"],
    )
    return Snapshot(
        made_of=about["made_of"],
        state=state,
        evaluated=dict(about["evaluated"]),
        best=tensors["best"],
    )
