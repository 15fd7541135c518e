"""Token ids on disk, mapped into memory: made once from a file, reused, never half.

A store is a folder of NumPy arrays and `header.json`, which names all that it is made of. It is
written beside and moved when it is whole.
"""

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from gpt2.data.dataset import Dataset, encode
from gpt2.data.examples import ALL, Fields, Range, stream_examples, within
from gpt2.files import listed, read_json

FORMAT, HEADER = 5, "header.json"
SMALL = 2**24  # bytes of a file whose tokens are kept in memory unless a cache is named
DEFAULTS: dict[str, Any] = encode.__kwdefaults__ or {}
TYPES = {"ids": "<u4", "ends": "<i8", "prompts": "<i4", "by_length": "<u4", "histogram": "<i8"}
KNOWN = ("truncated", "fingerprint", "unlearnable", "extremes")


def open_data(
    path: str | Path,
    tokenizer: Any,
    *,
    cache: str | Path | None = None,
    fields: Fields | None = None,
    side: Range = ALL,
    tell: Callable[[str], None] | None = None,
    **how: Any,
) -> Dataset:
    """The examples of a file, tokenised once and mapped from disk from then on.

    A small file is tokenised each time, unless `cache` is given. A store is made anew where source,
    tokenizer or an option changed.

    Args:
        path, fields: as for `read_examples`.
        tokenizer: as for `encode`, with a `fingerprint`, a string that no other tokenizer has.
        cache: the folder for the store; by default it lies beside the file.
        side: take only examples whose prompt's hash, in [0, 1), is in this range: (0, 0.1) is a
            tenth, and (0.1, 1) has none of its prompts.
        tell: is given a line where a store is made, and why.
        how: `max_length`, `eos`, `answer_only` and `separator`, as for `encode`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `read_examples` and `encode`; something else is at the store's path.
        OSError: the store cannot be written.
    """

    def encoded() -> Dataset:
        return encode(within(stream_examples(path, fields), side), tokenizer, **how)

    path = Path(path)
    source = path.stat()
    if cache is None and source.st_size < SMALL:
        return encoded()
    about = {"format": FORMAT, "tokenizer": tokenizer.fingerprint, **DEFAULTS, **how}
    about |= {"side": [*side], "fields": fields and dict(fields)}
    about |= {"bytes": source.st_size, "mtime_ns": source.st_mtime_ns}
    store = _store(path, cache, side)
    if why := _reason_to_make(store, about):
        if tell:
            tell(f"The tokens of {path} are written to {store}: {why}.")
        try:
            store.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=store.parent, prefix=f".{store.name}-") as beside:
                write(Path(beside, "new"), encoded(), about)
                with suppress(FileNotFoundError):  # who has the old one open keeps it
                    os.replace(store, Path(beside, "old"))
                with suppress(OSError):  # another run was faster
                    os.replace(Path(beside, "new"), store)
        except OSError as error:
            reason = f"{store.parent} ({error.strerror or error}): name another folder as cache"
            raise OSError(f"The tokens cannot be written to {reason}.") from None
    return open_store(store)[0]


def open_store(store: Path) -> tuple[Dataset, dict[str, Any]]:
    """The examples of a store, and all that it is made of."""
    header = read_json(store / HEADER)
    # As plain arrays: each index into a memmap makes another, in Python.
    arrays = {n: np.asarray(np.load(store / f"{n}.npy", mmap_mode="r")) for n in TYPES}
    ignored = arrays["prompts"] if header.get("answer_only") else 0
    return Dataset(**arrays, ignored=ignored, **{name: header[name] for name in KNOWN}), header


def write(folder: Path, data: Dataset, about: dict[str, Any]) -> None:
    """Write a store's arrays, ids in two bytes each where they fit, and its header."""
    folder.mkdir()
    types = TYPES | ({"ids": "<u2"} if data.extremes[1] < 2**16 else {})
    for name, dtype in types.items():
        np.save(folder / f"{name}.npy", getattr(data, name).astype(dtype))
    header = {**about, **{name: getattr(data, name) for name in KNOWN}}
    (folder / HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")


def _store(path: Path, cache: str | Path | None, side: Range) -> Path:
    part = "" if tuple(side) == ALL else f".{side[0]:g}-{side[1]:g}"
    if cache is None:
        return path.with_name(f"{path.name}{part}.tokens")
    # Files of one name in several folders may share a cache.
    of = blake2b(os.fsencode(path.resolve()), digest_size=4).hexdigest()
    return Path(cache) / f"{path.name}.{of}{part}.tokens"


def _reason_to_make(store: Path, about: dict[str, Any]) -> str:
    """Why the store cannot be taken for these tokens; empty if it can."""
    if not store.exists():
        return "there are none yet"
    if not (store / HEADER).is_file():
        raise ValueError(
            f"{store} is in the way, and no store of tokens: move it, or name another cache."
        )
    try:
        before = open_store(store)[1]
    except (OSError, ValueError, KeyError) as error:
        return str(error)
    changed = [(n, before.get(n), value) for n, value in about.items() if before.get(n) != value]
    return listed([f"{name} was {old} and is {new}" for name, old, new in changed])
