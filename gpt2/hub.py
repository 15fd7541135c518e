"""From a model's name to files on this disk: bundled, local, or downloaded from the Hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from gpt2.config import SIZES
from gpt2.faults import listed
from gpt2.files import read_json

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

_PLAIN = re.compile(r"\w[\w.-]*")  # a file's name without a folder: "..", "/" and "\" are not in it
Fetch = Callable[[str], Path | None]
"""The path of one of a source's files, or None where the source has no such file."""


def locate(name: str) -> tuple[Path | None, list[Path]]:
    """The config.json, if there is one, and the safetensors files that `name` stands for.

    Args:
        name: as for `gpt2.pretrained.load`.

    Raises:
        FileNotFoundError: there is no such path or repository, or it holds no safetensors weights.
        ConnectionError: the Hub is out of reach and its cache does not have the files.
        ValueError: the index of a sharded checkpoint is damaged, or names files elsewhere.
    """
    fetch = _source(name)
    config = fetch(CONFIG)
    if weights := fetch(WEIGHTS):
        return config, [weights]
    if index := fetch(INDEX):
        return config, _shards(fetch, index)
    raise FileNotFoundError(
        f"{name} has neither {WEIGHTS} nor {INDEX}. Nothing but safetensors is read: convert a "
        "pytorch_model.bin first."
    )


def _source(name: str) -> Fetch:
    if name in SIZES:
        return _hub(f"openai-community/{name}")
    path = Path(str(files("gpt2") / "assets" / "demo") if name == "demo" else name)
    if path.is_dir():
        return lambda file: found if (found := path / file).is_file() else None
    if path.is_file():
        beside = path.with_name(CONFIG)
        return {WEIGHTS: path, CONFIG: beside if beside.is_file() else None}.get
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return _hub(name)
    raise FileNotFoundError(
        f"There is no folder or file {name!r}. Pass {', '.join(SIZES)}, demo, a folder, "
        "a .safetensors file, or org/repo on the Hub."
    )


def _hub(repo: str) -> Fetch:
    # Imported here: it takes longer than all of this package, and most names do not need it.
    from huggingface_hub import (
        constants,
        errors,
        hf_hub_download,  # pyright: ignore[reportUnknownVariableType]
        try_to_load_from_cache,
    )

    def fetch(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(repo, file))
        except errors.LocalEntryNotFoundError:
            if try_to_load_from_cache(repo, file) is not None:
                return None  # the cache remembers that the repository has no such file
            raise ConnectionError(
                f"{repo}: the Hub is out of reach and {file} is not in the cache at "
                f"{constants.HF_HUB_CACHE}. Pass the path of a local copy, or 'demo'."
            ) from None
        except errors.EntryNotFoundError:
            return None
        except errors.RepositoryNotFoundError:  # gated and private ones too
            raise FileNotFoundError(
                f"There is no folder {repo!r} here, and no repository of that name that you may "
                f"read on {constants.ENDPOINT}."
            ) from None
        except (OSError, ValueError):  # the disk's and the name's faults speak for themselves
            raise
        except Exception as error:  # of the HTTP library, which is not always the same one
            raise ConnectionError(
                f"{repo}: the download of {file} broke off ({error}). Try again to resume it."
            ) from error

    return fetch


def _shards(fetch: Fetch, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map, so its shards are unknown.")
    names = sorted({str(shard) for shard in cast(dict[str, Any], weight_map).values()})
    if strange := [repr(name) for name in names if not _PLAIN.fullmatch(name)]:
        raise ValueError(
            f"{index} names shards that are no files of its own folder, and they are not read: "
            f"{listed(strange)}."
        )
    shards = {name: fetch(name) for name in names}
    if missing := [name for name, path in shards.items() if path is None]:
        raise FileNotFoundError(f"{index} lists files that are missing: {listed(missing)}.")
    return [path for path in shards.values() if path]
