"""Options from flags and a YAML file: none is abbreviated, lost or misspelt in silence."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from torch import nn

import lora

from .config_file import read_yaml, unknown_option
from .guard import Arguments

INSTEAD = (
    ("epochs", "steps"),
    ("tokens_per_batch", "train_batch_size"),
    ("warmup_ratio", "warmup_steps"),
)
PLACES = "adapter base cache output resume test validation".split()  # '' must be none of these


def add_lora(to: ArgumentParser) -> None:
    """The options of an adapter, under `lora.`."""
    to.add_class_arguments(lora.LoRAConfig, "lora", skip={"seed", "dtype"}, as_group=False)
    shared = "give a target whose weight is shared, such as a tied head, a weight of its own"
    to.add_argument("--lora.untie", type=bool, default=False, help=shared)


def inject(model: nn.Module, options: Namespace, adapter: str = "default") -> None:
    """A new adapter as the options say."""
    lora.inject(model, adapter=adapter, seed=options.seed, **options.lora)


def flags(to: ArgumentParser, argv: Arguments, *, defaults: bool = True) -> Namespace:
    """The options that the command line gives, and the defaults of the others.

    Raises:
        ValueError: naming the options that are unknown, and the nearest that are known; or those
            that are empty, as a variable of a shell is that was never set.
    """
    try:
        found = to.parse_args(argv, defaults=defaults)
        if empty := [name for name in PLACES if found.get(name) == ""]:
            raise ValueError(f"{', '.join(empty)} is empty: leave it out, or name a place.")
        return found
    except ArgumentError as error:
        unknown = re.match(r"unrecognized arguments: (.*)", str(error), re.IGNORECASE | re.DOTALL)
        if not unknown:
            raise
        names = [word.partition("=")[0] for word in unknown[1].split() if word[:2] == "--"]
        raise ValueError(
            " ".join(unknown_option(name[2:], _known(to), "--") for name in names if name != "--")
            or f"It is not clear what {unknown[1]!r:.80} is for: options begin with two dashes."
        ) from None


def with_config(
    to: ArgumentParser, argv: Arguments, default: Callable[[Namespace], Path]
) -> Namespace:
    """Options from the YAML file that `--config` names, or the default one, and flags over them.

    Of two options that exclude each other, a flag for one takes the place of the other in the file.
    What --help shows as defaults are the file's.

    Raises:
        ValueError: an option that is unknown, stands twice, or has a value of the wrong kind.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if asked := {"-h", "--help"} & {*words}:
        rest = [word for word in words if word not in asked]
        found = with_config(to, rest, default)
        to.set_defaults({name: found[name] for name in _known(to) if found[name] is not None})
    given = flags(to, argv, defaults=False)
    options = to.get_defaults()
    file = Path(given["config"]) if "config" in given else default(given)
    in_file = to.parse_object(read_yaml(file, _known(to)), defaults=False)
    if null := [n for n, value in in_file.items() if value is None and not _optional(to, n)]:
        raise ValueError(f"{file}: {', '.join(null)} cannot be null.")
    for one, other in (*INSTEAD, *(pair[::-1] for pair in INSTEAD)):
        if given.get(one) is not None and other not in given:
            in_file[other] = options[other]
    for name, value in (*in_file.items(), *given.items()):
        options[name] = value
    options["config"] = given.get("config") or file.name
    return options


def _known(to: ArgumentParser) -> list[str]:
    return list(to.get_defaults().keys())


def _optional(to: ArgumentParser, name: str) -> bool:
    """Whether an option may be null."""
    if to.get_defaults()[name] is None:
        return True
    try:
        return to.parse_args([f"--{name}=null"], defaults=False)[name] is None
    except ArgumentError:
        return False
