"""One run at a time in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt2 import locks


@contextmanager
def held(place: Path, *, instead: str = "res_path") -> Iterator[None]:
    """Nobody else writes in the folder or the file meanwhile, whose process heeds this lock too.

    Raises:
        ValueError: somebody does; `instead` is the option that names another.
    """
    try:
        descriptor = locks.take(place)
    except BlockingIOError:
        raise ValueError(
            f"Another run works in {place}: wait for its end, or name another {instead}."
        ) from None
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
