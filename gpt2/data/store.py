"""Token ids on disk, mapped into memory: made once from a file, found again, never half.

A store is a folder of four arrays and `header.json`, which names the version of the format, the
tokenizer, the options, the source (its size, its time and a hash of its content) and the size of
each array. It is written beside its place and moved there when it is whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np

from gpt2.data.encoding import Encoder, Options, check, encode, ignored
from gpt2.data.examples import Fields, stream_examples
from gpt2.data.held_out import ALL, within
from gpt2.data.parallel import Work, encoded_file
from gpt2.data.storing import FORMAT, HEADER, made, remove_left
from gpt2.data.tokens import Dataset
from gpt2.files import read_json

SMALL = 2**24  # bytes of a file whose tokens are kept in memory unless a cache is named


def open_data(
    path: str | Path,
    tokenizer: Encoder,
    *,
    cache: str | Path | None = None,
    fields: Fields | None = None,
    max_length: int = 1024,
    eos: bool = True,
    answer_only: bool = False,
    separator: int | None = None,
    side: tuple[float, float] = ALL,
    tell: Callable[[str], None] | None = None,
    progress: Callable[[int, float | None], None] | None = None,
) -> Dataset:
    """The examples of a file, tokenised once and mapped from disk from then on.

    A small file is tokenised into memory each time, unless `cache` is given. A store is made anew
    where its source, the tokenizer or an option is another now.

    Args:
        path, fields: as for `read_examples`.
        tokenizer, max_length, eos, answer_only, separator: as for `encode`; the tokenizer has a
            `fingerprint`.
        cache: the folder for the store; by default it lies beside the file.
        side: take only examples whose prompt's hash, in [0, 1), is in this range: (0, 0.1) is a
            tenth, and (0.1, 1) has none of its prompts.
        tell: is given a line where a store is made, and why.
        progress: is given how many more examples are encoded, now and then while a store is made,
            and the share of the file that was read, where it is known.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `read_examples` and `encode`; something else has the store's place.
        RuntimeError: the file changed while it was read.
        OSError: the store cannot be written.
    """
    path, options = Path(path), Options(max_length, eos, answer_only, separator)
    check(tokenizer, options)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing or no file.")
    if cache is None and path.stat().st_size < SMALL:
        examples = within(stream_examples(path, fields), side)
        return encode(examples, tokenizer, **asdict(options))
    part = "" if tuple(side) == ALL else f".{side[0]:g}-{side[1]:g}"
    place = (path.parent if cache is None else Path(cache)) / f"{path.name}{part}.tokens"
    work = Work(path, fields, tokenizer, options, side)
    about = _about(work)
    remove_left(place)
    if why := _reason_to_make(place, about, path):
        if tell:
            tell(f"The tokens of {path} are written to {place}: {why}.")
        source = _facts(path)
        found = encoded_file(work)
        with made(place, {**about, "source": source}) as write, closing(found):
            for block in found:
                write(block)
                if progress:
                    progress(len(block.lengths), block.reached)
            source["sha256"] = _sha256(path)
            if _facts(path).items() - source.items():
                raise RuntimeError(f"{path} changed while it was read: run again.")
    return open_store(place)


def open_store(place: str | Path) -> Dataset:
    """The examples of a store, whatever became of its source.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of another version, or cut short.
    """
    place = Path(place)
    if not (place / HEADER).is_file():
        raise FileNotFoundError(f"{place} is no store of tokens: it has no {HEADER}.")
    header = read_json(place / HEADER)
    if faults := _faults(place, header):
        raise ValueError(f"{place} cannot be used: {faults}. Remove it, and it is made again.")
    arrays = {
        name: np.memmap(place / name, dtype, mode="r")
        for name, (dtype, _) in cast(dict[str, Any], header["arrays"]).items()
    }
    unlearnt = ignored(arrays["prompts"], bool(header.get("answer_only")))
    known = {name: header[name] for name in ("truncated", "fingerprint", "repeated")}
    if "extremes" in header:  # else they are looked for when they are asked for
        known["extremes"] = tuple(header["extremes"])
    known["histogram"] = np.array(header["histogram"], np.int64)
    return Dataset(ignored=unlearnt, **arrays, **known)


def _faults(place: Path, header: Mapping[str, Any]) -> str:
    """Why a store cannot be read; empty if it can."""
    if header.get("format") != FORMAT:
        return f"it is of version {header.get('format')!r} of the format and this is {FORMAT}"
    sizes = {name: size for name, (_, size) in header["arrays"].items()}
    for name, size in sizes.items():
        file = place / name
        if (found := file.stat().st_size if file.is_file() else 0) != size:
            return f"its {name} has {found:,} bytes and should have {size:,}"
    return ""


def _reason_to_make(place: Path, about: Mapping[str, Any], path: Path) -> str:
    """Why the store cannot be taken for these tokens; empty if it can."""
    if not place.exists():
        return "there are none yet"
    if not (place / HEADER).is_file():
        raise ValueError(
            f"{place} is in the way, and no store of tokens: move it, or name another cache."
        )
    try:
        header = read_json(place / HEADER)
        if faults := _faults(place, header):
            return faults
        for name, value in about.items():
            if (was := header[name]) != value:
                return f"{name} was {was} and is {value}"
        source, now = header["source"], _facts(path)
        same = now.items() <= source.items()
        if same or (now["bytes"] == source["bytes"] and _sha256(path) == source["sha256"]):
            return ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {HEADER} cannot be used ({type(error).__name__}: {error})"
    return f"{path.name} has changed"


def _about(work: Work) -> dict[str, Any]:
    """What a store depends on beside its source."""
    if not isinstance(fingerprint := getattr(work.tokenizer, "fingerprint", None), str):
        raise ValueError(
            f"A store names its tokenizer, and {type(work.tokenizer).__name__} has no fingerprint: "
            "give it a string that tells it from others."
        )
    fields = None if work.fields is None else dict(work.fields)
    return {
        "tokenizer": fingerprint,
        **asdict(work.options),
        "fields": fields,
        "side": list(work.side),
    }


def _facts(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
