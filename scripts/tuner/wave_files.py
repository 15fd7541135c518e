"""What is kept of a search until it ends: what it is made of, and a file a wave, whole or none.

A wave that has no file is trained anew when the search is gone on with, to the same bits.
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

from gpt2 import streaming
from gpt2.training import fingerprints

from .runs import Place, Run
from .waves import Waves

FOLDER, MADE_OF = "waves", "made_of.json"
SAVE_EVERY = 60.0  # seconds between two files of a wave under way
SO_FAR = "-so-far"  # of a wave under way
PARTS = ("flat", "first", "second")
Values = list[Any]


class WaveFiles:
    """The files of a search, in its folder."""

    def __init__(self, place: Path) -> None:
        self.folder = place / FOLDER

    def begin(self, made_of: Mapping[str, str]) -> None:
        """Begin a search, or find out whether the one that was begun is this one.

        Raises:
            ValueError: naming what differs.
        """
        file = self.folder / MADE_OF
        if not file.is_file():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            part = file.with_suffix(".part")
            part.write_text(json.dumps(dict(made_of), indent=1), encoding="utf-8")
            os.replace(part, file)
            return
        with _damage_told(file, "begin anew with --overwrite true"):
            then = {**json.loads(file.read_text(encoding="utf-8"))}
        if odd := fingerprints.differences(then, made_of):
            raise ValueError(
                f"The search in {self.folder.parent} cannot be gone on with: {odd}. Give what it "
                "was begun with, or begin anew in another folder."
            )

    def write(self, name: str, runs: Sequence[Run], values: Values | None = None) -> None:
        """Keep what a wave came to, and the values that its trials have of the space."""
        kept = [i for i, run in enumerate(runs) if run.place]
        about = {
            "values": values,
            "kept": kept,
            "runs": [
                {"curve": run.curve, "losses": list(run.losses.items()), "ended": run.ended}
                for run in runs
            ],
        }
        places = [place for run in runs if (place := run.place)]
        tensors = {
            part: torch.stack([getattr(place, part) for place in places]) for part in PARTS if kept
        }
        file = self.folder / f"{name}.safetensors"
        part = file.with_suffix(".part")
        try:
            streaming.write(part, tensors, {"wave": json.dumps(about)})
            os.replace(part, file)
        except OSError as error:
            raise OSError(f"{file} cannot be written: {error}.") from None
        if not name.endswith(SO_FAR):
            (self.folder / f"{name}{SO_FAR}.safetensors").unlink(missing_ok=True)

    def values(self, name: str) -> Values | None:
        """The values of a wave's trials; None of a wave that did not come to its end."""
        file = self.folder / f"{name}.safetensors"
        return self._read(file)[0]["values"] if file.is_file() else None

    def read(self, name: str, runs: Sequence[Run]) -> bool:
        """Give runs what they came to in a wave, if it came to its end."""
        file = self.folder / f"{name}.safetensors"
        if not file.is_file():
            return False
        about, tensors = self._read(file)
        for run, found in zip(runs, about["runs"], strict=True):
            run.curve, run.ended, run.place = found["curve"], found["ended"], None
            run.losses = dict(found["losses"])
        for row, i in enumerate(about["kept"]):
            runs[i].place = Place(*(tensors[part][row] for part in PARTS))
        return True

    def under_way(self, name: str, waves: Waves, runs: Sequence[Run]) -> Callable[[], None]:
        """Give runs what is kept of a wave that was stopped; a function that keeps it from time to
        time."""
        self.read(name + SO_FAR, runs)
        saved = time.monotonic()

        def look() -> None:
            nonlocal saved
            if time.monotonic() - saved < SAVE_EVERY:
                return
            if so_far := waves.so_far(runs):  # else at the next call
                self.write(name + SO_FAR, so_far)
                saved = time.monotonic()

        return look

    def remove(self) -> None:
        """Take the files away: the search is over."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        told = _damage_told(file, "remove it, and it is trained anew")
        with told, cast(Any, safe_open(file, "pt")) as opened:
            return json.loads(opened.metadata()["wave"]), {
                name: opened.get_tensor(name)
                for name in opened.keys()  # noqa: SIM118
            }


@contextmanager
def _damage_told(file: Path, instead: str) -> Iterator[None]:
    """What is wrong with a file of ours is one error, which says what to do."""
    try:
        yield
    except (ValueError, TypeError, LookupError, SafetensorError) as error:
        raise ValueError(f"{file} is damaged: {error}. So {instead}.") from None
