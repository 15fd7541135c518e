"""From an adapter's name to its two files on this disk: a folder, or downloaded from the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lora.messages import brief

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_ADVICE = (
    "Nothing but safetensors is read: load it with PEFT and call save_pretrained, which writes that"
)


def locate(name: str | Path) -> tuple[Path, Path]:
    """The config and the weights of the adapter that `name` stands for.

    Args:
        name: a folder, or as a string "org/repo" on the Hub.

    Raises:
        FileNotFoundError: there is no such repository, or it is no adapter's.
        ConnectionError: the Hub is out of reach and its cache does not have the files.
    """
    folder = as_path(name)
    if isinstance(name, str) and not folder.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return _download(name, CONFIG), _download(name, WEIGHTS)
    if (folder / _PICKLE).is_file() and not (folder / WEIGHTS).exists():
        raise FileNotFoundError(
            f"{folder / WEIGHTS} is missing; there is {_PICKLE}, a pickle. {_ADVICE}."
        )
    return folder / CONFIG, folder / WEIGHTS


def as_path(name: str | Path) -> Path:
    """A path, if the file system can have one of this name.

    Raises:
        ValueError: it cannot.
    """
    try:
        if name != "" and b"\0" not in os.fsencode(name):  # "" would be the folder one is in
            return Path(name)
    except (TypeError, UnicodeEncodeError):
        pass
    raise ValueError(f"{brief(name)} is no path of a folder.")


def _download(repo: str, file: str) -> Path:
    # Imported here: it takes longer than all of this package, and most names do not need it.
    from huggingface_hub import (
        constants,
        errors,
        hf_hub_download,  # pyright: ignore[reportUnknownVariableType]
        try_to_load_from_cache,
    )

    missing = FileNotFoundError(
        f"{repo} on {constants.ENDPOINT} has no {file}, so it is no adapter that can be read. "
        f"If it has {_PICKLE}: {_ADVICE[0].lower()}{_ADVICE[1:]}."
    )
    try:
        return Path(hf_hub_download(repo, file))
    except errors.LocalEntryNotFoundError:
        if try_to_load_from_cache(repo, file) is not None:
            raise missing from None  # the cache remembers that the repository has no such file
        raise ConnectionError(
            f"{repo}: the Hub is out of reach and {file} is not in the cache at "
            f"{constants.HF_HUB_CACHE}. Pass the path of a local copy."
        ) from None
    except errors.EntryNotFoundError:
        raise missing from None
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
