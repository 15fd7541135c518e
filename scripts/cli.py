"""What every script needs of a command line: one-line errors, configs from options, a device."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import torch
from jsonargparse import ArgumentError, Namespace

import gpt2

Arguments = Sequence[str] | None
Config = TypeVar("Config")


def guarded(body: Callable[[Arguments], None]) -> Callable[[Arguments], int]:
    """Make the body of a script its `main`, which returns an exit code.

    Bad input gives one line on stderr and 2; Ctrl-C gives one line and 130.
    """

    @functools.wraps(body)
    def main(argv: Arguments = None) -> int:
        try:
            body(argv)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except KeyboardInterrupt as stop:
            return _say(f"Interrupted. {stop}", 130)
        except (ArgumentError, ValueError, RuntimeError, OSError) as error:
            return _say(str(error), 2)
        return 0

    return main


def build(kind: type[Config], options: Namespace, **renamed: Any) -> Config:
    """A config dataclass from the options named as its fields, and those that go by other names."""
    names = [field.name for field in fields(kind) if field.name not in renamed]  # pyright: ignore
    return kind(**{name: options[name] for name in names}, **renamed)


def encode(
    examples: list[gpt2.Example], tokenizer: gpt2.Tokenizer, options: Namespace
) -> gpt2.Dataset:
    """Tokenise examples as the options of training say."""
    return gpt2.encode(
        examples,
        tokenizer,
        max_length=options.max_token_length,
        eos=options.eos,
        answer_only=options.answer_only,
    )


def pick_device(name: str | None) -> str:
    """The device asked for, else the GPU if there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ValueError(f"device {name!r} cannot be used: {error}") from None
    return name


def _say(message: str, code: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return code
