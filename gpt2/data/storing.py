"""Writing a store of tokens: beside its place, a block at a time, and then moved there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from itertools import count
from pathlib import Path
from typing import IO, Any

import numpy as np

from gpt2.data.encoding import Block
from gpt2.data.tokens import AT_A_TIME, Digest

FORMAT = 1
HEADER = "header.json"
TRIES = 9
DTYPES = {"ends": "<i8", "ignored": "<i4", "by_length": "<u4"}


@contextmanager
def made(place: Path, about: Mapping[str, Any]) -> Generator[Callable[[Block], None]]:
    """A function to write blocks with; the store is in its place when the context ends well.

    Args:
        place: the store's folder; one that is there is replaced.
        about: what the header says beside what is counted here.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}-") as beside:
        folder = Path(beside) / "new"
        folder.mkdir()
        with ExitStack() as files:
            writer = _Writer(folder, files)
            yield writer.write
        writer.sort_by_length()
        (folder / HEADER).write_text(json.dumps(writer.header(about), indent=1), encoding="utf-8")
        for file in folder.iterdir():
            with file.open("rb") as f:
                os.fsync(f.fileno())
        for n in count():
            with suppress(FileNotFoundError):
                os.replace(place, Path(beside) / str(n))  # who has it open keeps it
            with suppress(OSError) if n < TRIES else nullcontext():  # another run was faster
                os.replace(folder, place)
                break


class _Writer:
    def __init__(self, folder: Path, files: ExitStack) -> None:
        self.folder, self.digest = folder, Digest()
        self.files: dict[str, IO[bytes]] = {
            name: files.enter_context((folder / name).open("wb"))
            for name in ("ids", "ends", "ignored")
        }
        self.dtypes = {"ids": "<u2", **DTYPES}
        self.tokens = self.truncated = 0
        self.histogram = np.zeros(1, np.int64)

    def write(self, block: Block) -> None:
        """Add a block's examples."""
        ends = self.tokens + np.cumsum(block.lengths)
        if block.ids.max() >= 2**16 and self.dtypes["ids"] == "<u2":
            self._widen()
        self.digest.add(block.ids, ends, block.ignored)
        arrays = {"ids": block.ids, "ends": ends, "ignored": block.ignored}
        for name, array in arrays.items():
            self.files[name].write(array.astype(self.dtypes[name]).data)
        self.tokens, self.truncated = int(ends[-1]), self.truncated + block.truncated
        counts = np.bincount(block.lengths, minlength=len(self.histogram))
        counts[: len(self.histogram)] += self.histogram
        self.histogram = counts

    def _widen(self) -> None:
        """Four bytes an id from now on: the vocabulary has more than two hold."""
        file = self.files["ids"]
        file.flush()
        held, wide = self.folder / "ids", self.folder / "wide"
        if self.tokens:
            narrow = np.memmap(held, "<u2", mode="r")
            np.memmap(wide, "<u4", mode="w+", shape=narrow.shape)[:] = narrow
            file.seek(0)
            file.write(wide.read_bytes())
            wide.unlink()
        self.dtypes["ids"] = "<u4"

    def sort_by_length(self) -> None:
        """The numbers of all examples, the shortest first: each goes where its length begins."""
        ends = np.memmap(self.folder / "ends", DTYPES["ends"], mode="r")
        file = self.folder / "by_length"
        found = np.memmap(file, DTYPES["by_length"], mode="w+", shape=ends.shape)
        begins = np.cumsum(self.histogram) - self.histogram
        before = 0
        for first in range(0, len(ends), AT_A_TIME):
            some = np.asarray(ends[first : first + AT_A_TIME])
            lengths = np.diff(some, prepend=before)
            order = np.argsort(lengths, kind="stable")
            ordered = lengths[order]
            rank = np.arange(len(some)) - np.searchsorted(ordered, ordered)
            found[begins[ordered] + rank] = first + order
            begins += np.bincount(lengths, minlength=len(begins))
            before = int(some[-1])
        found.flush()

    def header(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """What a reader needs to know."""
        return {
            "format": FORMAT,
            **about,
            "truncated": self.truncated,
            "fingerprint": self.digest.hexdigest(),
            "arrays": {n: [d, (self.folder / n).stat().st_size] for n, d in self.dtypes.items()},
            "histogram": self.histogram.tolist(),
        }
