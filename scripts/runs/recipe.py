"""The options that train_qa and search have in common: base, data, training, adapter, folder."""

from __future__ import annotations

from inspect import signature
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt, restricted_number_type

import gpt2
import lora

from ..cli.options import build

FORMATS = ".jsonl, .json, .csv, .tsv, .parquet or .txt file to train on"
AtLeastOne: Any = PositiveInt
AtLeastTwo: Any = restricted_number_type("AtLeastTwo", int, (">=", 2))
CONFIG = "YAML file of options, by default the demo's; flags win"


def add_options(to: ArgumentParser, data: str, kind: str) -> None:
    """All of them, under the names and defaults that the libraries give."""
    add = to.add_argument
    add("--config", action="config", help=CONFIG)
    add("--model_name", type=str, default="demo", help="demo, gpt2, org/repo, a folder or a file")
    add("--base_dropout", type=float | None, help="the base's own dropouts; by default as it says")
    add("--device", type=str | None, help="by default the GPU if there is one")
    add("--data", type=str, default=data, help=FORMATS)
    add("--fields", type=dict[str, str] | None, help="--fields.question NAME: the data's own names")
    add("--validation", type=str | None, help="file to evaluate on, or a share of the data: 0.1")
    last = "file, or a share, that decides nothing: the result alone is evaluated on it"
    add("--test", type=str | None, help=last)
    longest = signature(gpt2.encode).parameters["max_length"].default
    batch = gpt2.TrainConfig.batch_size
    add("--max_token_length", type=AtLeastTwo, default=longest, help="longer examples are cut")
    add("--train_batch_size", type=AtLeastOne, default=batch, help="examples a batch")
    to.add_function_arguments(
        gpt2.encode, skip={"examples", "tokenizer", "max_length"}, as_group=False
    )
    to.add_class_arguments(gpt2.TrainConfig, skip={"batch_size"}, as_group=False)
    add(
        "--b_ratio",
        type=PositiveFloat,
        default=1.0,
        help="learning rate of B over that of A (LoRA+)",
    )
    to.add_class_arguments(lora.LoRAConfig, "lora", skip={"seed", "dtype"}, as_group=False)
    place = f"folder for the results, by default a new runs/{kind}-N"
    add("--res_path", type=str | None, help=place)
    cache = "folder for the tokens of the data, by default beside a large file and nowhere else"
    add("--cache", type=str | None, help=cache)
    flag: dict[str, Any] = {"nargs": "?", "const": True, "default": False}
    add("--overwrite", type=bool, help="replace the run that res_path holds", **flag)
    again = "go on with the run of res_path, or of the folder that is named"
    add("--resume", type=bool | str, help=again, **flag)


def add_model_options(to: ArgumentParser) -> None:
    """A base, and perhaps an adapter, that answer prompts."""
    add = to.add_argument
    add("--base", type=str | None, help="demo, gpt2, org/repo, a folder; by default the adapter's")
    add("--adapter", type=str | None, help="a folder of train_qa.py, or of an adapter, PEFT's too")
    add("--device", type=str | None, help="by default the GPU if there is one")
    add("--separator", type=int | None, help="the token id after each prompt in training")


def training(options: Namespace) -> gpt2.TrainConfig:
    """How the options say to train."""
    return build(gpt2.TrainConfig, options, batch_size=options.train_batch_size)
