"""One run at a time in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Nobody else runs in the folder meanwhile; the lock goes with the process, however it ends.

    Raises:
        ValueError: somebody does.
    """
    if fcntl is None:
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"Another run works in {folder}: wait for its end, or name another res_path."
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(place)
