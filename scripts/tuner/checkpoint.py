"""What is kept of a search until it ends: a file a wave."""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open

from gpt2.files import write_tensors

from ..runs import folder, resume
from .trials import Run

SAVE_EVERY = 60.0  # seconds
PARTS = ("flat", "first", "second")  # of a run's position


class Checkpoint:
    """The files of a search."""

    def __init__(self, root: Path) -> None:
        self.folder, self._saved = root / folder.WAVES, time.monotonic()

    def begin(self, made_of: Mapping[str, Any]) -> None:
        """Begin or resume a search; another one raises."""
        file = self.folder / "made_of.json"
        if file.is_file():
            then = json.loads(file.read_text("utf-8"))
            resume.check_same(self.folder.parent, then, made_of)
            return
        self.remove()
        self.folder.mkdir(parents=True)
        folder.write_whole(file, json.dumps(made_of, indent=1))

    def write(self, name: str, runs: list[Run]) -> None:
        """Save a wave."""
        tensors = {
            f"{i}.{part}": tensor.clone()  # they may share memory
            for i, run in enumerate(runs)
            for part, tensor in zip(PARTS, run.position or (), strict=False)
        }
        rows = [{"curve": r.curve, "losses": [*r.losses.items()], "ended": r.ended} for r in runs]
        file = self.folder / f"{name}.safetensors"
        part = file.with_suffix(".part")
        try:
            write_tensors(part, tensors, {"runs": json.dumps(rows)})
            os.replace(part, file)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{file} cannot be written: {error}.") from None
        self._saved = time.monotonic()

    def write_if_due(self, name: str, so_far: Callable[[], list[Run]]) -> None:
        """Save a wave under way, once a minute."""
        if time.monotonic() - self._saved >= SAVE_EVERY and (runs := so_far()):
            self.write(name, runs)

    def read(self, name: str, runs: list[Run]) -> None:
        """Read what is saved of a wave into its runs."""
        file = self.folder / f"{name}.safetensors"
        if not file.is_file():
            return
        with cast(Any, safe_open(file, "pt")) as opened:
            rows, names = json.loads(opened.metadata()["runs"]), {*opened.keys()}
            for i, (run, row) in enumerate(zip(runs, rows, strict=True)):
                run.curve, run.ended, run.losses = row["curve"], row["ended"], dict(row["losses"])
                if f"{i}.flat" in names:
                    flat, first, second = (opened.get_tensor(f"{i}.{part}") for part in PARTS)
                    run.position = (flat, first, second)

    def remove(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.folder, ignore_errors=True)
