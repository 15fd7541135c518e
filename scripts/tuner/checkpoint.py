"""What is kept of a search until it ends: what it is made of, and a file a wave, whole or none.

A file is written anew while its wave trains, so that a kill costs a minute; what is not in it is
trained again when the search is resumed, to the same bits.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..runs import folder, resume
from .trials import Run, Values

MADE_OF = "made_of.json"
SAVE_EVERY = 60.0  # seconds between two writes of a wave under way
PARTS = ("flat", "first", "second")


def check(place: Path) -> None:
    """The error of a folder without a search to go on with."""
    if not (place / folder.WAVES / MADE_OF).is_file():
        raise FileNotFoundError(
            f"{place} holds no search to go on with: none was begun there, or it came to its end."
        )


class Checkpoint:
    """The files of a search, in its folder."""

    def __init__(self, place: Path) -> None:
        self.folder, self._saved = place / folder.WAVES, time.monotonic()

    def begin(self, made_of: Mapping[str, Any]) -> None:
        """Begin a search, or raise a ValueError where the one that was begun is another."""
        file = self.folder / MADE_OF
        if file.is_file():
            with _damage(file, "begin anew with --overwrite true"):
                then = {**json.loads(file.read_text(encoding="utf-8"))}
            resume.check_same("search", self.folder.parent, then, json.loads(json.dumps(made_of)))
            return
        self.remove()
        self.folder.mkdir(parents=True)
        folder.write_whole(file, json.dumps(made_of, indent=1))

    def write(self, name: str, runs: Sequence[Run], values: Sequence[Values] | None) -> None:
        """Keep what a wave has come to, and the values that its trials have of the space."""
        kept = {i: run.position for i, run in enumerate(runs) if run.position}
        rows = [{"curve": r.curve, "losses": [*r.losses.items()], "ended": r.ended} for r in runs]
        about = json.dumps({"values": values, "kept": [*kept], "runs": rows})
        stacks = map(torch.stack, zip(*kept.values(), strict=True))
        file = self.folder / f"{name}.safetensors"
        part = file.with_suffix(".part")
        try:
            save_file(dict(zip(PARTS, stacks, strict=False)), part, {"wave": about})
            with part.open("rb+") as stream:
                os.fsync(stream.fileno())
            os.replace(part, file)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{file} cannot be written: {error}.") from None
        self._saved = time.monotonic()

    def write_if_due(
        self, name: str, so_far: Callable[[], Sequence[Run]], values: Sequence[Values] | None
    ) -> None:
        """Keep a wave under way, if the last write is a minute ago; else at a later call."""
        if time.monotonic() - self._saved >= SAVE_EVERY and (runs := so_far()):
            self.write(name, runs, values)

    def values(self, name: str) -> list[Values] | None:
        """The values of a wave's trials; None where nothing is kept of it."""
        return self._read(name)[0]["values"]

    def read(self, name: str, runs: Sequence[Run]) -> None:
        """Give runs what is kept of their wave."""
        about, tensors = self._read(name)
        for run, row in zip(runs, about["runs"], strict=False):
            run.curve, run.ended, run.position = row["curve"], row["ended"], None
            run.losses = dict(row["losses"])
        for row, i in enumerate(about["kept"]):
            first, *others = (tensors[part][row] for part in PARTS)
            runs[i].position = (first, others[0], others[1])

    def remove(self) -> None:
        """Take the files away: the search is over."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        file = self.folder / f"{name}.safetensors"
        if not file.is_file():
            return {"values": None, "runs": [], "kept": []}, {}
        instead = "remove it, and it is trained anew"
        with _damage(file, instead), cast(Any, safe_open(file, "pt")) as opened:
            tensors = {name: opened.get_tensor(name) for name in list(opened.keys())}
            return json.loads(opened.metadata()["wave"]), tensors


@contextmanager
def _damage(file: Path, instead: str) -> Iterator[None]:
    """What is wrong with a file of ours is one error, which says what to do."""
    try:
        yield
    except (ValueError, TypeError, LookupError, SafetensorError) as error:
        raise ValueError(f"{file} is damaged: {error}. So {instead}.") from None
