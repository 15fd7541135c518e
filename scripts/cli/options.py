"""Options from flags and a YAML file by jsonargparse; an unknown name is told the nearest one."""

from __future__ import annotations

import argparse
import glob
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from .guard import VERBS

INSTEAD = (  # options that exclude each other
    ("epochs", "steps"),
    ("tokens_per_batch", "train_batch_size"),
    ("warmup_ratio", "warmup_steps"),
)
PATHS = "adapter base cache output resume test validation".split()  # '' must be none of these
OTHER_NAMES = {  # in the article's script and in transformers' and PEFT's
    "strategy": "logging_steps",
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "rank": "lora.r",
    "target_modules": "lora.targets",
    "output_dir": "res_path",
}
Config = TypeVar("Config")


def parser(script: str, description: str | None) -> ArgumentParser:
    """A script's parser, in which no option may be abbreviated."""
    return ArgumentParser(
        prog=program(script),
        description=description,
        epilog="--debug shows the traceback of an error.",
        exit_on_error=False,
        allow_abbrev=False,
    )


def program(script: str) -> str:
    """How the user starts a script: by the installed command, or as a file."""
    if Path(sys.argv[0]).stem == "lora-gpt2":
        return "lora-gpt2 " + next(verb for verb, name in VERBS.items() if name == script)
    return f"{script}.py"


def build(kind: type[Config], options: Namespace, **renamed: Any) -> Config:
    """A config dataclass from the options named as its fields, and those that go by other names."""
    names = [field.name for field in fields(kind) if field.name not in renamed]  # pyright: ignore
    return kind(**{name: options[name] for name in names}, **renamed)


def early(words: Sequence[str], *names: str) -> tuple[argparse.Namespace, list[str]]:
    """Some options before all are parsed, "" for one without a value; and the words left over."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in names:
        reader.add_argument(f"--{name}", nargs="?", const="")
    return reader.parse_known_args(words)


def parse(to: ArgumentParser, words: Sequence[str], file: Path | None = None) -> Namespace:
    """The options of the command line, over those of a YAML file, over the defaults.

    Of two options that exclude each other, a flag for one takes the place of the other in the file.
    """
    defaults, words = to.get_defaults(), list(words)
    known = [*defaults.keys(), "help", "print_config"]
    before = words[: words.index("--")] if "--" in words else words
    flags = [w[2:].partition("=")[0].rstrip("+") for w in before if w.startswith("--")]
    faults = [fault for name in flags for fault in _unknown(name, known, "--")]
    if file is not None:
        faults += [f"{file}: {fault}" for fault in _unknown_keys(_content(file), known)]
        to.default_config_files = [glob.escape(str(file))]
        for one, other in (*INSTEAD, *(pair[::-1] for pair in INSTEAD)):
            if one in flags and other not in flags:
                value = defaults[other]
                words.append(f"--{other}={'null' if value is None else value}")
    if faults:
        raise ValueError(" ".join(faults[:10]))
    try:
        options = to.parse_args(words)
    except (ArgumentError, TypeError) as error:
        raise ValueError(str(error)) from error
    for name, value in list(options.items()):  # a restricted number is a class of jsonargparse's
        if isinstance(value, int | float) and not isinstance(value, bool):
            options[name] = int(value) if isinstance(value, int) else float(value)
    if empty := [name for name in PATHS if options.get(name) == ""]:
        raise ValueError(f"{', '.join(empty)} is empty: leave it out, or name a place.")
    if file is not None:
        options["config"] = file.name
        del options["__default_config__"]  # jsonargparse's own note of the file
    return options


def _content(file: Path) -> Mapping[Any, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"The config {file} is missing or no file.")
    try:
        content = yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from None
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{file} must hold options, such as 'seed: 42', got {content!r:.80}.")
    return content


def _unknown_keys(
    content: Mapping[Any, Any], known: Sequence[str], above: str = ""
) -> Iterator[str]:
    for key, value in content.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and any(option.startswith(f"{name}.") for option in known):
            yield from _unknown_keys(value, known, f"{name}.")
        else:
            yield from _unknown(name, known, "")


def _unknown(name: str, known: Sequence[str], dashes: str) -> Iterator[str]:
    """That there is no such option, and what was probably meant; nothing if there is one."""
    if name in known or any(name.startswith(f"{option}.") for option in known):
        return
    if group := [f"{dashes}{option}" for option in known if option.startswith(f"{name}.")]:
        yield f"{dashes}{name} is a group of options: {', '.join(group)}."
        return
    last = name.rpartition(".")[2]
    meant = {option.rpartition(".")[2]: option for option in known} | {n: n for n in known}
    meant = {other: option for other, option in OTHER_NAMES.items() if option in known} | meant
    if last in OTHER_NAMES and last in meant:
        yield f"There is no option {dashes}{name}: {dashes}{meant[last]} takes its place."
        return
    (near,) = get_close_matches(name, meant, 1, 0.5) or get_close_matches(last, meant, 1, 0)
    yield f"There is no option {dashes}{name[:80]}: did you mean {dashes}{meant[near]}?"
