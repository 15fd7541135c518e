"""Options from flags and a YAML file: none is abbreviated, lost or misspelt in silence."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from torch import nn

import lora
from guard import Arguments

REPLACED = {"strategy": "logging_steps, the steps between two lines of output"}


def add_lora(to: ArgumentParser) -> None:
    """The options of an adapter, under `lora.`."""
    skip: set[str | int] = {"model", "adapter", "seed", "dtype", "untie"}
    to.add_function_arguments(lora.inject, "lora", skip=skip, as_group=False)
    shared = "give a target whose weight is shared, such as a tied head, a weight of its own"
    to.add_argument("--lora.untie", type=bool, default=False, help=shared)


def inject(model: nn.Module, options: Namespace, adapter: str = "default") -> None:
    """A new adapter as the options say."""
    lora.inject(model, adapter=adapter, seed=options.seed, **options.lora)


def flags(to: ArgumentParser, argv: Arguments, *, defaults: bool = True) -> Namespace:
    """The options that the command line gives, and the defaults of the others.

    Raises:
        ValueError: naming the options that are unknown, and the nearest that are known.
    """
    try:
        return to.parse_args(argv, defaults=defaults)
    except ArgumentError as error:
        unknown = re.match(r"unrecognized arguments: (.*)", str(error), re.IGNORECASE | re.DOTALL)
        if not unknown:
            raise
        names = [word[2:].partition("=")[0] for word in unknown[1].split() if word[:2] == "--"]
        known = _known(to)
        raise ValueError(
            " ".join(_unknown(name, known, "--") for name in names)
            or f"Nothing is known to do with {unknown[1]!r}: options begin with two dashes."
        ) from None


def with_config(to: ArgumentParser, argv: Arguments, default: Path) -> Namespace:
    """Options from the YAML file that `--config` names, or the default one, and flags over them.

    Of `epochs` and `steps` a flag for one takes the place of the other in the file.

    Raises:
        ValueError: an option that is unknown, stands twice, or has a value of the wrong kind.
    """
    given = flags(to, argv, defaults=False)
    options = to.get_defaults()
    content = read_yaml(Path(given.get("config") or default), _known(to))
    in_file = to.parse_object(content, defaults=False)
    for one, other in (("epochs", "steps"), ("steps", "epochs")):
        if given.get(one) is not None and other not in given:
            in_file[other] = None
    for name, value in (*in_file.items(), *given.items()):
        options[name] = value
    return options


def read_yaml(file: Path, known: Iterable[str]) -> dict[str, Any]:
    """A YAML file's options by their dotted names, which may be nested too.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no YAML of options, or has one that is unknown or stands twice.
    """
    if not file.is_file():
        raise FileNotFoundError(f"The config {file} is missing or no file.")
    try:
        content = yaml.load(file.read_bytes(), _Once)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from None
    if not isinstance(content, dict | None):
        raise ValueError(f"{file} must hold options, such as 'seed: 42', got {content!r:.80}.")
    known = [name for name in known if name != "config"]
    found: dict[str, Any] = {}
    faults: list[str] = []
    for name, value in _flat(content or {}, known, ""):
        if name in found:
            faults.append(f"{name} stands twice.")
        elif name not in known:
            groups = any(other.startswith(f"{name}.") for other in known)
            faults.append(
                f"{name} holds options of its own, got {value!r:.80}."
                if groups
                else _unknown(name, known, "")
            )
        found[name] = value
    if faults:
        raise ValueError(f"{file}: {' '.join(faults[:10])}")
    return found


class _Once(yaml.SafeLoader):
    """YAML in which no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"{twice[0]} stands twice")
        return super().construct_mapping(node, deep)


def _flat(content: Mapping[Any, Any], known: list[str], above: str) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and name not in known:
            yield from _flat(value, known, f"{name}.")
        else:
            yield name, value


def _known(to: ArgumentParser) -> list[str]:
    return list(to.get_defaults().keys())


def _unknown(name: str, known: Iterable[str], dashes: str) -> str:
    """That there is no such option, and what was probably meant."""
    said = f"There is no option {dashes}{name[:80]}"
    if name in REPLACED:
        return f"{said}: use {dashes}{REPLACED[name]}."
    by_last = {option.rpartition(".")[2]: option for option in known} | {n: n for n in known}
    last = name.rpartition(".")[2]
    near = [n for n in (name, last) if n in by_last]
    near = near or difflib.get_close_matches(name, by_last, 1, 0.5)
    near = near or difflib.get_close_matches(last, by_last, 1, 0)
    return f"{said}. The nearest is {dashes}{by_last[near[0]]}."
