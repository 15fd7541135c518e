"""Locks on files and folders, which go with the process that has them, however it ends."""

from __future__ import annotations

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def take(place: str | Path) -> int | None:
    """A descriptor that has the lock until it is closed; None where there are no locks.

    Raises:
        BlockingIOError: somebody else has it.
        OSError: there is no such place.
    """
    if fcntl is None:
        return None
    descriptor = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    return descriptor
