"""A YAML file of options, by dotted or nested names: none is lost, and none misspelt in silence."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lora.foreign import MISSING, PEFT_NAMES

OTHER_NAMES = {  # of the article and of PEFT's and transformers' scripts
    "strategy": "logging_steps",
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "rank": "lora.r",
    "output_dir": "res_path",
    **{theirs: f"lora.{ours}" for theirs, ours in PEFT_NAMES.items()},
}


def read_yaml(file: Path, known: Iterable[str]) -> dict[str, Any]:
    """A YAML file's options by their dotted names, which may be nested too.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no YAML of options, or has one that is unknown or stands twice.
    """
    if not file.is_file():
        raise FileNotFoundError(f"The config {file} is missing or no file.")
    try:
        with file.open("rb") as stream:
            content = yaml.load(stream, _Once)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from None
    except RecursionError:
        raise ValueError(f"{file} is nested too deep.") from None
    if not isinstance(content, dict | None):
        raise ValueError(f"{file} must hold options, such as 'seed: 42', got {content!r:.80}.")
    known = [name for name in known if name != "config"]
    found: dict[str, Any] = {}
    faults: list[str] = []
    for name, value in _flat(content or {}, known, ""):
        if name in found:
            faults.append(f"{name} stands twice.")
        elif name not in known:
            faults.append(unknown_option(name, known, ""))
        elif name == "tasks" and not isinstance(value, list | None):
            faults.append(f"tasks must be a list of files, got {value!r:.80}.")
        found[name] = value
    if faults:
        raise ValueError(f"{file}: {' '.join(faults[:10])}")
    return found


class _Once(yaml.SafeLoader):
    """YAML in which no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, times in keys.items() if times > 1]:
            raise ValueError(f"{twice[0]} stands twice")
        return super().construct_mapping(node, deep)


def _flat(content: Mapping[Any, Any], known: list[str], above: str) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and name not in known:
            yield from _flat(value, known, f"{name}.")
        else:
            yield name, value


def unknown_option(name: str, known: Iterable[str], dashes: str) -> str:
    """That there is no such option, and what was probably meant."""
    if group := [f"{dashes}{option}" for option in known if option.startswith(f"{name}.")]:
        return f"{dashes}{name} is a group of options: {', '.join(group)}."
    meant = {option.rpartition(".")[2]: option for option in known} | {n: n for n in known}
    meant |= {other: option for other, option in OTHER_NAMES.items() if option in meant}
    last = name.rpartition(".")[2]
    if last in OTHER_NAMES and last in meant:
        return f"There is no option {dashes}{name}: {dashes}{meant[last]} takes its place."
    if last in MISSING and "lora.r" in meant.values():
        return f"There is no option {dashes}{name}: {MISSING[last]}."
    near = [n for n in meant if n == last] or [n for n in meant if n.startswith(name)]
    near = near or difflib.get_close_matches(name, meant, 1, 0.5)
    near = near or difflib.get_close_matches(last, meant, 1, 0)
    return f"There is no option {dashes}{name[:80]}: did you mean {dashes}{meant[near[0]]}?"
