"""Tune a GPT-2 on examples with LoRA, and show its answers before and after."""

from __future__ import annotations

if __name__ == "__main__":  # on top, so that Ctrl-C during the imports below ends in one line
    import sys

    import command

    sys.exit(command.start("train_qa", sys.argv[1:]))

from inspect import signature
from pathlib import Path

from jsonargparse import Namespace

import cli
import folder
import gpt2
import guard
import inputs
import options as opts
import processes
import single
import starting
import tasks
import validation

DEMO = Path(__file__).resolve().parent / "configs" / "demo.yaml"


def parse(argv: guard.Arguments) -> Namespace:
    """The script's own options, and the library's under the names and defaults it gives them."""
    parser = cli.parser("train_qa", __doc__)
    add = parser.add_argument
    add("--config", type=str | None, help="YAML file of options, by default the demo's; flags win")
    add("--model_name", type=str, default="demo", help="demo, gpt2, org/repo, a folder or a file")
    add("--base_dropout", type=float | None, help="the base's own dropouts; by default as it says")
    add("--device", type=str | None, help="by default the GPU if there is one")
    add("--data", type=str, default=str(inputs.ARTICLE), help=inputs.FORMATS)
    add("--tasks", type=str, nargs="+", help="data files: an adapter for each, on one base")
    add("--prompts", type=str | None, help="file to try out; answers in it are references")
    add("--fields", type=dict[str, str] | None, help="--fields.question NAME: the data's own names")
    longest = signature(gpt2.encode).parameters["max_length"].default
    batch = gpt2.TrainConfig.batch_size
    add("--max_token_length", type=int, default=longest, help="longer examples are cut")
    add("--train_batch_size", type=int, default=batch, help="examples a batch")
    add("--logging_steps", type=int, default=5, help="steps between two lines of output")
    starting.add_options(parser)
    parser.add_function_arguments(
        gpt2.encode, skip={"examples", "tokenizer", "max_length"}, as_group=False
    )
    parser.add_class_arguments(gpt2.TrainConfig, skip={"batch_size"}, as_group=False)
    validation.add_options(parser)
    opts.add_lora(parser)
    parser.add_class_arguments(gpt2.GenerateConfig, "generate", skip={"seed"}, as_group=False)
    options = opts.with_config(parser, argv, lambda given: starting.options_file(given, DEMO))
    for name, least in (("logging_steps", 1), ("max_token_length", 2)):
        if options[name] < least:
            raise ValueError(f"{name} must be at least {least}, got {options[name]}.")
    return options


@guard.guarded
def main(argv: guard.Arguments = None) -> None:
    """Parse, build, train, show, save."""
    with processes.joined():
        with processes.agreed():
            options = parse(argv)
            training = cli.build(gpt2.TrainConfig, options, batch_size=options.train_batch_size)
            sampling = cli.build(gpt2.GenerateConfig, options.generate, seed=options.seed)
            device = processes.own_device(cli.pick_device(options.device))
            names = tasks.named(options.tasks) if options.tasks else [folder.ADAPTER]
            starting.check(options, names)
            sources, prompts = inputs.read(options.tasks or [options.data], options)
            model = inputs.base(options, device)
            console = cli.Plain(quiet=processes.rank() > 0)
            reader = inputs.Reader(gpt2.Tokenizer(), model, options, console)
        work = tasks.run if options.tasks else single.run
        work(names, sources, prompts, reader, training, sampling)
