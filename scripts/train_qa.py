"""Tune a GPT-2 on examples with LoRA, and show its answers before and after."""

from __future__ import annotations

if __name__ == "__main__":  # on top, so that Ctrl-C during the imports below ends in one line
    import sys
    from pathlib import Path

    sys.path[0] = str(
        Path(__file__).resolve().parents[1]
    )  # the rooms are in a package, by one name
    from scripts.command import start

    sys.exit(start("train_qa", sys.argv[1:]))

from pathlib import Path

from jsonargparse import Namespace

import gpt2

from .cli import cli, guard
from .cli import options as opts
from .runs import folder, inputs, processes, recipe, single, starting, tasks, validation

DEMO = Path(__file__).resolve().parent / "configs" / "demo.yaml"


def parse(argv: guard.Arguments) -> Namespace:
    """The script's own options, and the library's under the names and defaults it gives them."""
    parser = cli.parser("train_qa", __doc__)
    add = parser.add_argument
    add("--config", type=str | None, help="YAML file of options, by default the demo's; flags win")
    add("--tasks", type=str, nargs="+", help="data files: an adapter for each, on one base")
    add("--prompts", type=str | None, help="file to try out; answers in it are references")
    add("--logging_steps", type=int, default=5, help="steps between two lines of output")
    recipe.add_options(parser, str(inputs.ARTICLE))
    starting.add_options(parser)
    validation.add_options(parser)
    parser.add_class_arguments(gpt2.RunConfig, skip={"folder"}, as_group=False)
    parser.add_class_arguments(gpt2.GenerateConfig, "generate", skip={"seed"}, as_group=False)
    options = opts.with_config(parser, argv, starting.options_file("train_qa", DEMO))
    recipe.check(options, {"logging_steps": 1})
    return options


@guard.guarded
def main(argv: guard.Arguments = None) -> None:
    """Parse, build, train, show, save."""
    with processes.joined():
        with processes.agreed():
            options = parse(argv)
            training = recipe.training(options)
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
