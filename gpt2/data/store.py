"""Token ids on disk, mapped into memory: made once from a file, found again, never half.

A store is a folder of four arrays and `header.json`, which names all that the store is made of and
the size of each array. It is written beside its place and moved there when it is whole.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from gpt2.data.dataset import Dataset, Encoder, Options, encoded, ignored
from gpt2.data.examples import Fields, check, examples_in, stream_examples
from gpt2.data.held_out import ALL, within
from gpt2.files import listed, read_json

FORMAT, HEADER = 3, "header.json"
SMALL = 2**24  # bytes of a file whose tokens are kept in memory unless a cache is named
KNOWN = ("truncated", "fingerprint", "repeated", "unlearnable", "extremes", "histogram")


def open_data(
    path: str | Path,
    tokenizer: Encoder,
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
    where its source, the tokenizer or an option is another now.

    Args:
        path, fields: as for `read_examples`.
        tokenizer: as for `encode`, with a `fingerprint`.
        cache: the folder for the store; by default it lies beside the file.
        side: take only examples whose prompt's hash, in [0, 1), is in this range: (0, 0.1) is a
            tenth, and (0.1, 1) has none of its prompts.
        tell: is given a line where a store is made, and why.
        progress: is given how many more examples are encoded, now and then while a store is made,
            and the share of the file that was read, where it is known.
        how: `max_length`, `eos`, `answer_only` and `separator`, as for `encode`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `read_examples` and `encode`; something else has the store's place.
        RuntimeError: the file changed while it was read.
        OSError: the store cannot be written.
    """
    path, options = Path(path), Options(**how)
    check(path, fields)
    if cache is None and path.stat().st_size < SMALL:
        return encoded(within(stream_examples(path, fields), side), tokenizer, options)
    if not isinstance(fingerprint := getattr(tokenizer, "fingerprint", None), str):
        raise ValueError(
            f"A store names its tokenizer, and {type(tokenizer).__name__} has no fingerprint: "
            "give it a string that tells it from others."
        )
    about = {"tokenizer": fingerprint, **options._asdict(), "side": [*side], **_source(path)}
    about["fields"] = None if fields is None else dict(fields)
    place = _place(path, cache, side)
    if why := _reason_to_make(place, about):
        if tell:
            tell(f"The tokens of {path} are written to {place}: {why}.")
        with path.open("rb") as file, _moved_to(place) as folder:

            def shown(examples: int) -> None:
                if progress:
                    progress(examples, file.tell() / about["bytes"] or None)

            data = encoded(within(examples_in(file, fields), side), tokenizer, options, shown)
            write(folder, data, about)
            if {**about, **_source(path)} != about:
                raise RuntimeError(f"{path} changed while it was read: run again.")
    return open_store(place)


def open_store(place: str | Path) -> Dataset:
    """The examples of a store, whatever became of its source; an error says why it has none."""
    place = Path(place)
    if not (place / HEADER).is_file():
        raise FileNotFoundError(f"{place} is no store of tokens: it has no {HEADER}.")
    try:
        header = _header(place)
    except (ValueError, LookupError) as error:
        raise ValueError(f"{place} cannot be used: {error}. Remove it to make it anew.") from None
    arrays = {n: np.memmap(place / n, kind, "r") for n, (kind, _) in header["arrays"].items()}
    known: dict[str, Any] = {name: header[name] for name in KNOWN}
    known["histogram"] = np.array(known["histogram"], np.int64)
    unlearnt = ignored(arrays["prompts"], bool(header.get("answer_only")))
    return Dataset(ignored=unlearnt, **arrays, **known)


def write(folder: Path, data: Dataset, about: dict[str, Any]) -> None:
    """Write a store's arrays, and its header."""
    arrays = data.arrays()
    for name, array in arrays.items():
        array.tofile(folder / name)
    header = {"format": FORMAT, **about, **{name: getattr(data, name) for name in KNOWN}}
    header["histogram"] = data.histogram.tolist()
    header["arrays"] = {name: [array.dtype.str, array.nbytes] for name, array in arrays.items()}
    (folder / HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")


@contextmanager
def _moved_to(place: Path) -> Generator[Path]:
    """A new folder, which takes the store's place at the end; who has an old one open keeps it."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}-") as beside:
            folder = Path(beside, "new")
            folder.mkdir()
            yield folder
            for written in folder.iterdir():
                with written.open("rb") as file:
                    os.fsync(file.fileno())
            with suppress(FileNotFoundError):
                os.replace(place, Path(beside, "old"))
            try:
                os.replace(folder, place)
            except OSError:
                if not place.is_dir():  # else another run was faster
                    raise
    except OSError as error:
        raise OSError(
            f"The tokens cannot be written to {place.parent} ({error.strerror or error}): name "
            "another folder as cache."
        ) from None


def _place(path: Path, cache: str | Path | None, side: tuple[float, float]) -> Path:
    part = "" if tuple(side) == ALL else f".{side[0]:g}-{side[1]:g}"
    if cache is None:
        return path.with_name(f"{path.name}{part}.tokens")
    # Files of one name in several folders may share a cache.
    of = blake2b(os.fsencode(path.resolve()), digest_size=4).hexdigest()
    return Path(cache) / f"{path.name}.{of}{part}.tokens"


def _source(path: Path) -> dict[str, int]:
    return {"bytes": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}


def _reason_to_make(place: Path, about: dict[str, Any]) -> str:
    """Why the store cannot be taken for these tokens; empty if it can."""
    if not place.exists():
        return "there are none yet"
    if not (place / HEADER).is_file():
        raise ValueError(
            f"{place} is in the way, and no store of tokens: move it, or name another cache."
        )
    try:
        header = _header(place)
    except (ValueError, LookupError) as error:
        return str(error)
    changed = [(n, header.get(n), value) for n, value in about.items() if header.get(n) != value]
    return listed([f"{name} was {before} and is {now}" for name, before, now in changed])


def _header(place: Path) -> dict[str, Any]:
    """A store's header, if the store is whole."""
    header = read_json(place / HEADER)
    if header.get("format") != FORMAT:
        raise ValueError(f"it has format {header.get('format')!r} and this version reads {FORMAT}")
    for name, (_, size) in header["arrays"].items():
        if not (place / name).is_file() or (place / name).stat().st_size != size:
            raise ValueError(f"its {name} is cut short")
    return header
