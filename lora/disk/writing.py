"""Files on disk, in their places all together or not at all."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_BESIDE = ".saving-"  # how the folders begin in which files wait for their places
_TRIES, _PAUSE = 1000, 0.01  # of getting a lock; seconds between them


@contextmanager
def replacing(folder: Path) -> Generator[Path]:
    """A new folder to write files in; they take their places in `folder` when the context ends.

    An error before that, such as a full disk, changes nothing, and two writers do not mix. A reader
    may still meet one new file beside an old one, and so may everyone after a kill at that moment:
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
        if taken := [file.name for file in files if (folder / file.name).is_dir()]:
            raise IsADirectoryError(f"{folder} has folders called {', '.join(taken)}.")
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
    """Hold the folder's lock, which goes with the process.

    Where the disk knows no locks, or another writer hangs, go on without: it is a courtesy.
    """
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for _ in range(_TRIES):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_PAUSE)
            except OSError:  # no locks on this disk
                break
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # for processes forked meanwhile too
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
