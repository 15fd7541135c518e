"""Find the best adapter: many train, the worse retire, the best run again."""

if __name__ == "__main__":  # before slow imports
    import sys

    sys.path[0] = __file__.rpartition("scripts")[0]
    from scripts.cli.guard import start

    sys.exit(start("search", sys.argv[1:]))

from functools import partial
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace

import gpt2
import lora
from gpt2.training import snapshots

from .cli.console import bar
from .cli.guard import Arguments, guarded
from .cli.options import AtLeastOne, AtLeastTwo, add_options, add_scoring, parse, parser, training
from .page import page
from .runs import answers, data, folder, processes, resume, scores
from .tuner import checkpoint, outcome, sampler
from .tuner.halving import Plan
from .tuner.search import Search
from .tuner.trials import NAMES, Recipe, read_space
from .tuner.waves import Waves

SIZES = "trials rungs keep slots sampler finalists seeds"
DEMO = Path(__file__).resolve().parent / "configs" / "search_demo.yaml"
SPACE = f"what varies: [choices] or {{low, high}} of {', '.join(NAMES)}"


def options_of(argv: Arguments) -> Namespace:
    """The options of a search and its default configuration."""
    to = parser("search", __doc__)
    add_options(to, str(data.DATA / "weather.jsonl"), "search")
    add, count, two = to.add_argument, AtLeastOne, AtLeastTwo
    add("--space", type=dict[str, Any], default={}, help=SPACE)
    add("--trials", type=count, default=64, help="trials of the first rung")
    add("--slots", type=count, default=16, help="trainings at a time")
    add("--rungs", type=count, default=3, help="rounds; the worse retire between")
    add("--keep", type=two, default=4, help="1 in KEEP goes on, KEEP times as far")
    add_scoring(to)
    kinds = Literal["random", "tpe"]
    add("--sampler", type=kinds, default="random", help="tpe learns from wave to wave")
    add("--finalists", type=count, default=4, help="of the last rung, to run again")
    add("--seeds", type=two, default=3, help="of finalists and the default")

    file, words = resume.config(argv or [], DEMO)
    options = parse(to, words, file)

    if options.validation is None:
        raise ValueError("A search needs validation data: give --validation.")
    scores.check(options)
    if processes.size() > 1 and options.res_path is None and not options.resume:
        raise ValueError("Several processes need one folder: give --res_path.")
    return options


def usual_of(options: Namespace) -> Recipe:
    """The default configuration."""
    adapter = lora.LoRAConfig(seed=options.seed, **options.lora)
    return Recipe(adapter=adapter, training=training(options), b_ratio=options.b_ratio)


def waves_of(options: Namespace, reader: data.Reader, split: data.Split) -> Waves:
    """The populations of the planned search."""
    usual = usual_of(options)
    known = read_space(options.space, options.trials, usual)
    cooldown = 0 if options.schedule == "constant" else Plan.cooldown
    sizes = {name: options[name] for name in SIZES.split()}
    plan = Plan(space=known, usual=usual, cooldown=cooldown, **sizes)
    plan.check(split.train)
    assert split.validation is not None
    waves = Waves(reader.model, split.train, split.validation, plan, reader.console.print)
    waves.check_memory()
    return waves


@guarded
@processes.joined()
def main(argv: Arguments = None) -> None:
    """Load, plan, search, record, page."""
    clock = folder.Clock()
    with processes.agreed():
        options = options_of(argv)
        sampler.optuna()  # may raise
        start = resume.decide(options, "search", [folder.WINNER])
        reader = data.Reader(options, options.model_name, options.base_dropout)
        model, console = reader.model, reader.console
        split = reader.split(options.data, training(options))
        waves = waves_of(options, reader, split)
        made_of = {"splits": split.made_of, "base": snapshots.of_base(model)}

    line = f"{folder.examples_line(split.train)}{split.message} {waves.plan.message()}"
    console.print(line, soft_wrap=True)
    clock.lap("load")

    with resume.begun(start, options) as root, waves:
        files = checkpoint.Checkpoint(root)
        with processes.agreed():
            if not processes.rank():
                files.begin(made_of)

        total = waves.plan.cost(gpt2.total_steps(split.train, training(options)))
        with bar(console, "adapter-steps", total) as progress:
            how: dict[str, Any] = {
                "checkpoint": files,
                "progress": progress,
                "tell": console.print,
                "score": options.score,
                "score_prompts": options.score_prompts,
                "by_score": options.choose_by == "score",
            }
            search = Search(waves=waves, **how)
            search.search(split.test)
        if processes.rank():
            return

        clock.lap("search")
        measure = partial(answers.measure, split=split, tokenizer=reader.tokenizer)
        ids, asked = split.train[0][0].tolist(), int(split.train.prompts[0])
        prompt, best = reader.tokenizer.decode(ids[: asked or 8]), root / folder.WINNER
        use = folder.commands([best], options.model_name, prompt)
        facts = folder.about(options, model, clock, [split.train])
        facts["commands"] = {"use": use}
        outcome.write(search, resume.kept(options), root, facts, measure)
        page.write(root)
        files.remove()

    winner = search.runs[search.winner].recipe.values([*waves.plan.space.axes])
    console.print(outcome.results(search)["verdict"], f"The winner has {winner}.")
    folder.end(console, root, use)
