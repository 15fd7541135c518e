"""Token ids on disk, mapped into memory: made once from a file, reused, never half.

A store is a folder of NumPy arrays and `header.json`, which names all that it is made of. It is
written beside and moved when it is whole.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from gpt2.data.dataset import Dataset, encode
from gpt2.data.examples import Example, Fields, examples_in, opened, stream_examples
from gpt2.data.held_out import ALL, within
from gpt2.files import listed, read_json

FORMAT, HEADER = 4, "header.json"
SMALL = 2**24  # bytes of a file whose tokens are kept in memory unless a cache is named
DEFAULTS: dict[str, Any] = encode.__kwdefaults__ or {}
COUNTED = 1 << 12  # examples after which progress is shown
KNOWN = ("truncated", "fingerprint", "repeated", "unlearnable", "extremes")


def open_data(
    path: str | Path,
    tokenizer: Any,
    *,
    cache: str | Path | None = None,
    fields: Fields | None = None,
    side: tuple[float, float] = ALL,
    tell: Callable[[str], None] | None = None,
    progress: Callable[[int, float | None], None] | None = None,
    **how: Any,
) -> Dataset:
    """The examples of a file, tokenised once and mapped from disk from then on.

    A small file is tokenised into memory each time, unless `cache` is given. A store is made anew
    where source, tokenizer or an option changed.

    Args:
        path, fields: as for `read_examples`.
        tokenizer: as for `encode`, with a `fingerprint`, a string that no other tokenizer has.
        cache: the folder for the store; by default it lies beside the file.
        side: take only examples whose prompt's hash, in [0, 1), is in this range: (0, 0.1) is a
            tenth, and (0.1, 1) has none of its prompts.
        tell: is given a line where a store is made, and why.
        progress: is given now and then how many more examples are encoded, and the share of the
            file that was read, where it is known.
        how: `max_length`, `eos`, `answer_only` and `separator`, as for `encode`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `read_examples` and `encode`; something else is at the store's path.
        OSError: the store cannot be written.
    """
    path = Path(path)
    if cache is None and path.stat().st_size < SMALL:
        return encode(within(stream_examples(path, fields), side), tokenizer, **how)
    about = {"format": FORMAT, "tokenizer": tokenizer.fingerprint, **DEFAULTS, **how}
    about |= {"side": [*side], "fields": fields and dict(fields)}
    about |= {"bytes": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}
    store = _store(path, cache, side)
    if why := _reason_to_make(store, about):
        if tell:
            tell(f"The tokens of {path} are written to {store}: {why}.")
        try:
            store.parent.mkdir(parents=True, exist_ok=True)
            with (
                tempfile.TemporaryDirectory(dir=store.parent, prefix=f".{store.name}-") as beside,
                opened(path) as file,
            ):
                examples = within(examples_in(file, fields), side)
                if progress:
                    examples = _counted(examples, file, progress)
                write(Path(beside, "new"), encode(examples, tokenizer, **how), about)
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
    names = ("ids", "ends", "prompts", "by_length", "histogram")
    # As plain arrays: each index into a memmap makes another, in Python.
    arrays = {n: np.asarray(np.load(store / f"{n}.npy", mmap_mode="r")) for n in names}
    ignored = arrays["prompts"] if header.get("answer_only") else 0
    return Dataset(**arrays, ignored=ignored, **{name: header[name] for name in KNOWN}), header


def write(folder: Path, data: Dataset, about: dict[str, Any]) -> None:
    """Write a store's arrays, ids in two bytes each where they fit, and its header."""
    folder.mkdir()
    np.save(folder / "ids.npy", data.ids.astype("<u2" if data.extremes[1] < 2**16 else "<u4"))
    np.save(folder / "ends.npy", data.ends.astype("<i8"))
    np.save(folder / "prompts.npy", data.prompts.astype("<i4"))
    np.save(folder / "by_length.npy", data.by_length.astype("<u4"))
    np.save(folder / "histogram.npy", data.histogram.astype("<i8"))
    header = {**about, **{name: getattr(data, name) for name in KNOWN}}
    (folder / HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")


def _counted(
    examples: Iterator[Example], file: TextIO, progress: Callable[[int, float | None], None]
) -> Iterator[Example]:
    size = os.fstat(file.fileno()).st_size
    while part := list(islice(examples, COUNTED)):
        yield from part
        progress(len(part), (size if file.closed else file.buffer.tell()) / size or None)


def _store(path: Path, cache: str | Path | None, side: tuple[float, float]) -> Path:
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
