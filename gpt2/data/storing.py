"""Writing a store of tokens: beside its place, a block at a time, and then moved there."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from itertools import count
from pathlib import Path
from typing import IO, Any

import numpy as np

from gpt2 import locks
from gpt2.data.encoding import Block, ignored
from gpt2.data.tokens import AT_A_TIME, Digest

FORMAT = 2
HEADER, HASHES = "header.json", "hashes"
TRIES = 9
DTYPES = {"ends": "<i8", "prompts": "<i4", "by_length": "<u4"}


@contextmanager
def made(place: Path, about: Mapping[str, Any]) -> Generator[Callable[[Block], None]]:
    """A function to write blocks with; the store is in its place when the context ends well.

    Args:
        place: the store's folder; one that is there is replaced.
        about: what the header says beside what is counted here, and `answer_only`.

    Raises:
        OSError: it cannot be written.
    """
    with _refusing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        beside, lock = _new_beside(place)
    folder = beside / "new"
    try:
        with ExitStack() as files:
            with _refusing(place):
                folder.mkdir()
                writer = _Writer(folder, files, bool(about.get("answer_only")))
            yield writer.write
        with _refusing(place):
            writer.finish(about)
            _moved(folder, place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_left(place: Path) -> None:
    """Remove what writers of this store left beside it whose processes were killed."""
    for beside in place.parent.glob(f".{glob.escape(place.name)}-*"):
        with suppress(OSError):  # somebody writes it, or removes it too
            if (lock := locks.take(beside)) is not None:
                shutil.rmtree(beside, ignore_errors=True)
                os.close(lock)


def _new_beside(place: Path) -> tuple[Path, int | None]:
    """A folder beside the place, and the lock that keeps others from removing it."""
    while True:
        beside = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}-"))
        with suppress(BlockingIOError, FileNotFoundError):  # taken for one that was left
            lock = locks.take(beside)
            if beside.exists():
                return beside, lock


@contextmanager
def _refusing(place: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"The tokens cannot be written to {place.parent} ({error.strerror or error}): name "
            "another folder as cache."
        ) from None


def _moved(folder: Path, place: Path) -> None:
    """Move a store to its place, on the disk and whole."""
    for file in folder.iterdir():
        with file.open("rb") as f:
            os.fsync(f.fileno())
    for n in count():
        with suppress(FileNotFoundError):
            os.replace(place, folder.with_name(str(n)))  # who has it open keeps it
        with suppress(OSError) if n < TRIES else nullcontext():  # another run was faster
            os.replace(folder, place)
            return


class _Writer:
    def __init__(self, folder: Path, files: ExitStack, answer_only: bool) -> None:
        self.folder, self.digest, self.answer_only = folder, Digest(), answer_only
        self.files: dict[str, IO[bytes]] = {
            name: files.enter_context((folder / name).open("wb"))
            for name in ("ids", "ends", "prompts", HASHES)
        }
        self.dtypes = {"ids": "<u2", HASHES: "<u8", **DTYPES}
        self.tokens = self.truncated = 0
        self.extremes: list[int] = []
        self.histogram = np.zeros(1, np.int64)

    def write(self, block: Block) -> None:
        """Add a block's examples."""
        ends = self.tokens + np.cumsum(block.lengths)
        known = [*self.extremes, int(block.ids.min()), int(block.ids.max())]
        self.extremes = [min(known), max(known)]
        if self.extremes[1] >= 2**16 and self.dtypes["ids"] == "<u2":
            self._widen()
        self.digest.add(block.ids, ends, ignored(block.prompts, self.answer_only))
        arrays = {"ids": block.ids, "ends": ends, "prompts": block.prompts, HASHES: block.hashes}
        with _refusing(self.folder.parents[1]):
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
            _empty(wide, "<u4", self.tokens)[:] = narrow
            file.seek(0)
            file.write(wide.read_bytes())
            wide.unlink()
        self.dtypes["ids"] = "<u4"

    def finish(self, about: Mapping[str, Any]) -> None:
        """Write what takes all examples to know."""
        self.sort_by_length()
        found = {**self.header(about), "repeated": self.count_repeated()}
        (self.folder / HEADER).write_text(json.dumps(found, indent=1), encoding="utf-8")

    def count_repeated(self) -> int:
        """How many examples are as an earlier one: their hashes are sorted on the disk."""
        found = np.memmap(self.folder / HASHES, self.dtypes.pop(HASHES), mode="r+")
        found.sort()
        steps = range(0, len(found) - 1, AT_A_TIME)
        repeated = sum(
            int((found[i : i + AT_A_TIME + 1][1:] == found[i : i + AT_A_TIME + 1][:-1]).sum())
            for i in steps
        )
        (self.folder / HASHES).unlink()
        return repeated

    def sort_by_length(self) -> None:
        """The numbers of all examples, the shortest first: each goes where its length begins."""
        ends = np.memmap(self.folder / "ends", DTYPES["ends"], mode="r")
        found = _empty(self.folder / "by_length", DTYPES["by_length"], len(ends))
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
            "extremes": self.extremes,
            "arrays": {
                name: [dtype, (self.folder / name).stat().st_size]
                for name, dtype in self.dtypes.items()
                if name != HASHES
            },
            "histogram": self.histogram.tolist(),
        }


def _empty(file: Path, dtype: str, size: int) -> Any:
    """A new array on the disk, whose place is taken: a full disk is an error here, not a crash."""
    with file.open("wb") as made:
        bytes_of_all = size * np.dtype(dtype).itemsize
        for first in range(0, bytes_of_all, AT_A_TIME):
            made.write(bytes(min(AT_A_TIME, bytes_of_all - first)))
    return np.memmap(file, dtype, mode="r+")
