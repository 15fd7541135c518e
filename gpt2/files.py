"""Files of a folder, read strictly and written all together or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast


@contextmanager
def written(folder: str | Path) -> Generator[Path]:
    """An empty folder to write files to, which are then moved to `folder`.

    They are on the disk before the first is moved. After an error, such as a full disk, nothing
    has changed. Files get the modes that the umask says.
    """
    if folder == "":  # which would be the folder one is in
        raise ValueError("'' is no path of a folder.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as made:
        yield Path(made)
        files = sorted(Path(made).iterdir())
        plain = Path(made, ".plain")
        plain.touch()
        for file in files:
            file.chmod(plain.stat().st_mode)  # some libraries write for the owner only
            with file.open("rb") as f:
                os.fsync(f.fileno())
        for file in files:
            os.replace(file, folder / file.name)


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: it holds none, names a key twice, or is nested too deep to be read.
    """
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except ValueError as error:  # not UTF-8, not JSON, or a key that comes twice
        raise ValueError(f"{file} is not JSON: {error}.") from None
    except RecursionError:
        raise ValueError(f"{file} is nested too deep to be read.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold a JSON object, found {type(found).__name__}.")
    return cast(dict[str, Any], found)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, in which Python's own reader lets the last of two equal keys win."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key[:100]!r} comes twice")
    return found


def _refuse(constant: str) -> Any:
    """NaN and Infinity, which Python's own reader takes."""
    raise ValueError(f"{constant} is no number of JSON's")
