"""What every script needs of a command line: its name, a console, configs, a device."""

from __future__ import annotations

import json
import re
import sys
from argparse import HelpFormatter
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from ..command import SCRIPTS

Config = TypeVar("Config")


class _Parser(ArgumentParser):
    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        return re.sub(r"\bNone\b", "null", super().format_help(formatter))  # as flags have it


def parser(script: str, description: str | None) -> ArgumentParser:
    """A script's parser, in which no option may be abbreviated."""
    return _Parser(
        prog=program(script), description=description, exit_on_error=False, allow_abbrev=False
    )


def build(kind: type[Config], options: Namespace, **renamed: Any) -> Config:
    """A config dataclass from the options named as its fields, and those that go by other names."""
    names = [field.name for field in fields(kind) if field.name not in renamed]  # pyright: ignore
    return kind(**{name: options[name] for name in names}, **renamed)


class Plain(Console):
    """Shows text as it is: no path and no answer is markup."""

    def __init__(self, *, quiet: bool = False) -> None:
        terminal = False if quiet else None  # and so no progress bar
        super().__init__(
            markup=False, emoji=False, highlight=False, quiet=quiet, force_terminal=terminal
        )

    def on_broken_pipe(self) -> None:
        """Leave the error to `guarded`; rich would end the process, and training with it."""
        raise BrokenPipeError("Nobody reads the output any more.")


def program(script: str) -> str:
    """How the user starts a script: by the installed command, or as a file."""
    if Path(sys.argv[0]).stem == "lora-gpt2":
        return "lora-gpt2 " + next(verb for verb, name in SCRIPTS.items() if name == script)
    return f"{script}.py"


def pick_device(name: str | None) -> str:
    """The device asked for, else the best one here.

    Raises:
        ValueError: there is no such device here.
    """
    if name is None:
        return best_device(torch.cuda.is_available(), torch.backends.mps.is_available())
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,4})?", name):
        raise ValueError(f"device must be cpu, mps, cuda or cuda:N, got {name!r}.")
    try:
        torch.empty(1, device=name)
    except Exception as error:  # each backend has its own; torch asserts that it knows CUDA
        raise ValueError(f"device {name!r} cannot be used here: {error}") from None
    return name


def best_device(cuda: bool, mps: bool) -> str:
    """CUDA's GPU before Apple's, and the processor where there is neither."""
    return "cuda" if cuda else "mps" if mps else "cpu"


def base_of(adapter: str | None) -> str:
    """The base that an adapter says it was made for; the demo's where it does not say."""
    if adapter is None:
        return "demo"
    try:
        config = json.loads((adapter_folder(adapter) / "adapter_config.json").read_bytes())
        return config["base_model_name_or_path"] or "demo"
    except (OSError, ValueError, LookupError, TypeError):
        return "demo"  # what is wrong with the adapter is said when it is loaded


def adapter_folder(place: str) -> Path:
    """The adapter in a run's folder, or the folder itself.

    Raises:
        ValueError: the run made several adapters, or none yet.
    """
    inside = sorted(file.parent for file in Path(place).glob("*/adapter_config.json"))
    if not inside and Path(place, "options.yaml").is_file():
        raise ValueError(f"{place} holds a run that has no adapter yet: --resume {place} goes on.")
    if not inside or Path(place, "adapter_config.json").is_file():
        return Path(place)
    if [file.name for file in inside] == ["adapter", "last"]:
        return inside[0]  # the best
    if len(inside) > 1:
        names = ", ".join(map(str, inside))
        raise ValueError(f"{place} holds several adapters: name one of {names}.")
    return inside[0]
