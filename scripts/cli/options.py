"""Options from flags and a YAML file, by jsonargparse."""

import glob
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt, restricted_number_type

import gpt2
import lora

from .guard import VERBS

INSTEAD = {"epochs": "steps", "warmup_ratio": "warmup_steps"}
INSTEAD["tokens_per_batch"] = "train_batch_size"
INSTEAD |= {other: one for one, other in INSTEAD.items()}  # exclusive
PATHS = "adapter base cache output resume test validation".split()  # never ''
OTHER_NAMES = {  # the article's, transformers', PEFT's
    "strategy": "logging_steps",
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "rank": "lora.r",
    "target_modules": "lora.targets",
    "output_dir": "res_path",
}
AtLeastOne: Any = PositiveInt
AtLeastTwo: Any = restricted_number_type("AtLeastTwo", int, (">=", 2))
FLAG: dict[str, Any] = {"nargs": "?", "const": True, "default": False}
BASE = "demo, gpt2, org/repo, a folder or a file"
DEVICE = "by default a GPU if there is one"
Config = TypeVar("Config")


def parser(script: str, description: str | None) -> ArgumentParser:
    """A script's parser."""
    return ArgumentParser(
        prog=program(script),
        description=description,
        epilog="--debug shows the traceback of an error.",
        exit_on_error=False,
        allow_abbrev=False,
    )


def program(script: str) -> str:
    """How the user starts a script: a command, or a file."""
    if Path(sys.argv[0]).stem == "lora-gpt2":
        return "lora-gpt2 " + next(verb for verb, name in VERBS.items() if name == script)
    return f"{script}.py"


def build(kind: type[Config], options: Namespace, **renamed: Any) -> Config:
    """A config from options of its fields' names."""
    names = [field.name for field in fields(kind) if field.name not in renamed]  # pyright: ignore
    return kind(**{name: options[name] for name in names}, **renamed)


def add_options(to: ArgumentParser, data: str, kind: str) -> None:
    """The options of training, with the libraries' defaults."""
    add, encoding = to.add_argument, signature(gpt2.encode).parameters
    add("--config", action="config", help="YAML file; flags win")
    add("--model_name", type=str, default="demo", help=BASE)
    add("--base_dropout", type=float | None, help="else the base's")
    add("--device", type=str | None, help=DEVICE)
    add("--data", type=str, default=data, help="jsonl, json, csv, tsv, parquet, txt")
    add("--fields", type=dict[str, str] | None, help="--fields.question NAME")
    add("--validation", type=str | None, help="file, or a share of the data: 0.1")
    add("--test", type=str | None, help="file, or share")
    longest, size = encoding["max_length"].default, gpt2.TrainConfig.batch_size
    add("--max_token_length", type=AtLeastTwo, default=longest, help="tokens of an example")
    add("--train_batch_size", type=AtLeastOne, default=size, help="examples a batch")
    skip: set[str | int] = {"examples", "tokenizer", "max_length"}
    to.add_function_arguments(gpt2.encode, skip=skip, as_group=False)
    to.add_class_arguments(gpt2.TrainConfig, skip={"batch_size"}, as_group=False)
    add("--b_ratio", type=PositiveFloat, default=1.0, help="LoRA+: lr of B / lr of A")
    to.add_class_arguments(lora.LoRAConfig, "lora", skip={"seed", "dtype"}, as_group=False)
    add("--res_path", type=str | None, help=f"by default runs/{kind}-N")
    add("--cache", type=str | None, help="folder for tokens of a large file")
    add("--overwrite", type=bool, help="replace the run there", **FLAG)
    add("--resume", type=bool | str, help="go on there, or in FOLDER", **FLAG)


def add_scoring(to: ArgumentParser) -> None:
    """A score of generated text."""
    add, choices = to.add_argument, Literal["loss", "score"]
    add("--score", type=str | None, help="exact, bleu, chrf or file.py:function")
    add("--score_prompts", type=AtLeastOne, default=64, help="prompts to continue")
    add("--choose_by", type=choices, default="loss", help="validation loss, or the score")


def add_model_options(to: ArgumentParser, *, several: bool = False) -> None:
    """A base and an adapter, or several."""
    add, more = to.add_argument, dict[str, Any](nargs="+") if several else {}
    add("--base", type=str | None, help=f"{BASE}; else the adapter's")
    kind: Any = str if several else str | None
    add("--adapter", type=kind, help="folder of a run or an adapter", **more)
    add("--device", type=str | None, help=DEVICE)
    add("--separator", type=int | None, help="token id after a prompt")


def training(options: Namespace) -> gpt2.TrainConfig:
    """The training's config."""
    return build(gpt2.TrainConfig, options, batch_size=int(options.train_batch_size))


def parse(to: ArgumentParser, words: list[str], file: Path | None = None) -> Namespace:
    """Options of the command line, a YAML file, defaults."""
    defaults, words = to.get_defaults(), list(words)
    known = [*defaults.keys(), "help", "print_config"]
    before = words[: words.index("--")] if "--" in words else words
    flags = [w[2:].partition("=")[0].rstrip("+") for w in before if w.startswith("--")]
    faults = [*_unknown(flags, known, "--")]
    if file is not None:
        faults += [f"{file}: {fault}" for fault in _unknown(_keys(_content(file), known), known)]
        to.default_config_files = [glob.escape(str(file))]
        for other in [INSTEAD[name] for name in flags if name in INSTEAD]:
            if other not in flags:
                value = defaults[other]
                words.append(f"--{other}={'null' if value is None else value}")

    if faults:
        raise ValueError(" ".join(faults[:10]))
    try:
        options = to.parse_args(words)
    except (ArgumentError, TypeError) as error:
        raise ValueError(str(error)) from error
    if empty := [name for name in PATHS if options.get(name) in ("", [""])]:
        raise ValueError(f"{', '.join(empty)} is empty: leave it out.")
    if file is not None:
        options["config"] = file.name
        del options["__default_config__"]
    return options


def _content(file: Path) -> Mapping[Any, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"The config {file} is missing or no file.")
    try:
        content = yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from None
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{file} must hold options, such as 'seed: 42'.")
    return content


def _keys(content: Mapping[Any, Any], known: list[str], above: str = "") -> Iterator[str]:
    for key, value in content.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and any(option.startswith(f"{name}.") for option in known):
            yield from _keys(value, known, f"{name}.")
        else:
            yield name


def _unknown(names: Iterable[str], known: list[str], dashes: str = "") -> Iterator[str]:
    meant = {option.rpartition(".")[2]: option for option in known} | {n: n for n in known}
    meant = {other: n for other, n in OTHER_NAMES.items() if n in known} | meant
    for name in names:
        if name not in known and not any(name.startswith(f"{option}.") for option in known):
            last = name.rpartition(".")[2]
            group = [option for option in known if option.startswith(f"{name}.")]
            near = get_close_matches(name, meant, 1, 0.6) or get_close_matches(last, meant, 1, 0)
            option = group[0] if group else meant[near[0]]
            yield f"There is no option {dashes}{name[:80]}: did you mean {dashes}{option}?"
