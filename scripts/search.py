"""Find the best adapter: many are trained side by side, the worse retire, the best run again."""

from __future__ import annotations

if __name__ == "__main__":  # on top, so that Ctrl-C during the imports below ends in one line
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])  # rooms are known by their package alone
    from scripts.cli.guard import start

    sys.exit(start("search", sys.argv[1:]))

import os
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace

import gpt2
import lora
from gpt2.training import fingerprints

from .cli.console import Plain, bar
from .cli.guard import Arguments, guarded
from .cli.options import parse, parser
from .page import page
from .runs import adapter_stats, data, folder, processes, recipe, record, resume
from .tuner import checkpoint, outcome, sampler, space
from .tuner.halving import Halving
from .tuner.search import MOST, Plan, Search
from .tuner.trials import DEFAULT, Recipe, Run
from .tuner.waves import Waves, largest_rank

DEMO = Path(__file__).resolve().parent / "configs" / "search_demo.yaml"
SPACE = f"what varies: [choices], or {{low, high}} in logarithms; of {', '.join(space.NAMES)}"


def options_of(argv: Arguments) -> Namespace:
    """The options of a search, and those of its default configuration as `train_qa.py` has them."""
    to = parser("search", __doc__)
    recipe.add_options(to, str(data.DATA / "weather.jsonl"), "search")
    add, count, two = to.add_argument, recipe.AtLeastOne, recipe.AtLeastTwo
    add("--space", type=dict[str, Any], default={}, help=SPACE)
    add("--trials", type=count, default=64, help="configurations in the first rung")
    add("--slots", type=count, default=16, help="trainings at a time, in one batch")
    add("--rungs", type=count, default=3, help="how often the worse retire, plus one")
    add("--keep", type=two, default=4, help="one in so many goes on, and so many times as far")
    kinds = Literal["random", "tpe"]
    add("--sampler", type=kinds, default="random", help="random, or tpe, which learns by waves")
    add("--finalists", type=count, default=4, help="trials of the last rung that run again")
    add("--seeds", type=two, default=3, help="of each finalist and of the default")
    file, words = resume.config(argv or (), "search", DEMO)
    options = parse(to, words, file)
    if options.validation is None:
        raise ValueError("A search chooses by validation data: give --validation.")
    if options.trials > MOST:
        raise ValueError(f"trials must be at most {MOST:,}, got {options.trials:,}.")
    if processes.size() > 1 and options.res_path is None and not options.resume:
        raise ValueError("Several processes share a folder: name it with --res_path.")
    return options


def usual_of(options: Namespace) -> Recipe:
    """The default configuration."""
    adapter = lora.LoRAConfig(seed=options.seed, **options.lora)
    return Recipe(adapter=adapter, training=recipe.training(options), b_ratio=options.b_ratio)


def plan_of(options: Namespace, train: gpt2.Dataset) -> Plan:
    """What the options say to search."""
    usual = usual_of(options)
    names = ("slots", "sampler", "finalists", "seeds")
    return Plan(
        space=space.read(options.space, options.trials, usual),
        usual=usual,
        halving=Halving(trials=options.trials, rungs=options.rungs, keep=options.keep),
        **{name: options[name] for name in names},
    ).checked(train)


def waves_of(plan: Plan, model: gpt2.GPT2, split: data.Split, console: Plain) -> Waves:
    """What trains, if the targets are there and the slots fit in memory."""
    room = plan.space.room(plan.usual, largest_rank(model, plan.space.room(plan.usual)))
    slots = min(plan.slots, -(-plan.halving.trials // processes.size()))
    assert split.validation is not None
    splits = (split.train, split.validation)
    waves = Waves(model, *splits, plan.usual.training, room, slots, console.print)
    total = gpt2.total_steps(split.train, plan.usual.training)
    usual = Run(trial=DEFAULT, recipe=plan.usual, total=total)
    waves.check_memory(usual, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return waves


@guarded
def main(argv: Arguments = None) -> None:
    """Load, plan, search, record, page."""
    clock = record.Clock()
    with processes.joined():
        with processes.agreed():
            options = options_of(argv)
            sampler.optuna()  # raises where it is missing
            start = resume.decide(options, "search", [folder.WINNER], checkpoint.check)
            device = processes.pick_device(options.device)
            source = data.read(options.data, options)
            base, dropout = options.model_name, options.base_dropout
            model = gpt2.GPT2.from_pretrained(base, device=device, dropout=dropout)
            console = Plain(quiet=processes.rank() > 0)
            reader = data.Reader(gpt2.Tokenizer(), model, options, console)
            split = reader.split(source, recipe.training(options))
            plan = plan_of(options, split.train)
            waves = waves_of(plan, model, split, console)
            made_of = {
                **resume.kept(options),
                "data": split.made_of,
                "base": fingerprints.of_base(model),
            }
        line = f"{record.examples_line(split.train)}{split.message} {plan.message()}"
        console.print(line, soft_wrap=True)
        clock.lap("load")
        with resume.begun(start, options) as place, waves:
            files = checkpoint.Checkpoint(place)
            with processes.agreed():
                if not processes.rank():
                    files.begin(made_of)
            total = plan.steps(gpt2.total_steps(split.train, plan.usual.training))
            with resume.resumable(place), bar(console, "adapter-steps", total) as progress:
                how = {"checkpoint": files, "progress": progress, "tell": console.print}
                search = Search(plan=plan, waves=waves, **how)
                search.search(split.test)
            if processes.rank():
                return  # the first goes on alone
            clock.lap("search")
            measure = partial(adapter_stats.measure, split=split, tokenizer=reader.tokenizer)
            splits = {"training": split.train, "selection": split.validation, "test": split.test}
            sizes = {n: s and {"examples": len(s), "tokens": s.n_tokens} for n, s in splits.items()}
            ids, asked = split.train[0][0].tolist(), int(split.train.prompts[0])
            prompt, best = reader.tokenizer.decode(ids[: asked or 8]), place / folder.WINNER
            commands = folder.commands(best / folder.TRAINED_BY, [best], base, prompt)
            facts = record.about(options, model, clock) | {"data": sizes, "commands": commands}
            with resume.resumable(place):
                claim = outcome.write(search, resume.kept(options), place, facts, measure)
            page.write(place)
            files.remove()  # the search is over
        console.print(outcome.finalist_table(search), claim, sep="\n")
        record.end(console, place, commands["use"])
