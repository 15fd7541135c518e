"""Tune a GPT-2 on examples with LoRA, and show its answers before and after."""

from __future__ import annotations

if __name__ == "__main__":  # on top, so that Ctrl-C during the imports below ends in one line
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])  # rooms are known by their package alone
    from scripts.cli.guard import start

    sys.exit(start("train_qa", sys.argv[1:]))

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

import gpt2
import lora

from .cli.console import Plain
from .cli.guard import Arguments, guarded
from .cli.options import build, parse, parser
from .page import page
from .runs import answers, data, folder, processes, recipe, record, resume, train

DEMO = Path(__file__).resolve().parent / "configs" / "demo.yaml"


def options_of(argv: Arguments) -> Namespace:
    """The script's own options, and the library's under the names and defaults it gives them."""
    to = parser("train_qa", __doc__)
    recipe.add_options(to, str(data.ARTICLE), "qa")
    tasks = "data files: an adapter for each, on one base"
    to.add_argument("--tasks", type=str, nargs="+", help=tasks)
    prompts = "file to try out; answers in it are references"
    to.add_argument("--prompts", type=str | None, help=prompts)
    steps = "steps between two lines of output"
    to.add_argument("--logging_steps", type=recipe.AtLeastOne, default=5, help=steps)
    to.add_class_arguments(gpt2.RunConfig, skip={"folder"}, as_group=False)
    to.add_class_arguments(gpt2.GenerateConfig, "generate", skip={"seed"}, as_group=False)
    file, words = resume.config(argv or (), "train_qa", DEMO)
    options = parse(to, words, file)
    if options.validation is None and (options.patience or options.eval_every):
        raise ValueError("patience and eval_every need validation data: give --validation.")
    if options.tasks and options.generate.num_beams > 1:
        raise ValueError("--tasks routes each row of a batch, so generate.num_beams must be 1.")
    return options


@guarded
def main(argv: Arguments = None) -> None:
    """Load, inject, baseline answers, train, answers, record, page."""
    clock = record.Clock()
    with processes.joined():
        with processes.agreed():
            options = options_of(argv)
            config = recipe.training(options)
            sampling = build(gpt2.GenerateConfig, options.generate, seed=options.seed)
            device = processes.pick_device(options.device)
            names = train.names_of(options.tasks)
            start = resume.decide_training(options, names)
            sources = [data.read(file, options) for file in options.tasks or [options.data]]
            prompts = data.prompts_of(sources, options)
            base, dropout = options.model_name, options.base_dropout
            model = gpt2.GPT2.from_pretrained(base, device=device, dropout=dropout)
            console = Plain(quiet=processes.rank() > 0)
            reader = data.Reader(gpt2.Tokenizer(), model, options, console)
            splits = {n: reader.split(s, config) for n, s in zip(names, sources, strict=True)}
            counts = {"base": lora.count_parameters(model)}
            missing = train.inject(reader, splits, start)
            counts["LoRA"] = lora.count_parameters(model)
            how = (reader.tokenizer, model, sampling, options.separator)
            ids = data.encode_prompts(prompts, *how)
        console.print(record.parameter_table(counts))
        clock.lap("load")
        with lora.disabled(model):
            baseline = [] if processes.rank() else answers.ask(model, ids, sampling, console)
        clock.lap("base answers")
        with resume.begun(start, options) as place:
            targets = {name: train.Target(name, place) for name in names}
            results = {
                name: train.train_one(reader, splits[name], config, targets[name], start)
                for name in missing
            }
            if processes.rank():
                return  # the first goes on alone
            clock.lap("training")
            routes = [*names, dict.fromkeys(names, 1 / len(names))] if options.tasks else []
            tuned = answers.ask(model, ids, sampling, console, routes)
            clock.lap("tuned answers")
            heads = ["base", *names, "mixture"] if options.tasks else ["base", "tuned"]
            ids_of = [[*before, *after] for before, after in zip(baseline, tuned, strict=True)]
            texts = [[*map(reader.tokenizer.decode, row)] for row in ids_of]
            rows = answers.compare(prompts, heads, texts, data.trained(sources, options))
            if not options.tasks:
                whole, most = sources[0].whole, sampling.max_new_tokens
                stops = [len(ids) < most for (ids,) in tuned]
                pairs = zip(rows, stops, strict=True)
                rows = [answers.judged(a, stopped=s, searched=whole) for a, s in pairs]
            sets = [split.train for split in splits.values()]
            tokens, cut = sum(s.n_tokens for s in sets), sum(s.truncated for s in sets)
            size = {"examples": sum(map(len, sets)), "tokens": tokens, "truncated": cut}
            facts: dict[str, Any] = {"parameters": counts, "data": size}
            facts |= {**results.get(train.ALONE, {}), **answers.publish(rows, place, console)}
            adapters = [place / name for name in names] if options.tasks else [place]
            prompt = min((p.text for p in prompts), key=len, default="Once upon a time")
            commands = folder.commands(place / folder.OPTIONS, adapters, base, prompt)
            record.write(
                place, record.about(options, model, clock) | facts | {"commands": commands}
            )
            page.write(place)
            for target in targets.values():
                resume.snapshots.remove(target.directory)  # the run is over
        record.end(console, place, commands["use"])
