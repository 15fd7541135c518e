"""Tune a GPT-2 with LoRA, and show its answers before and after."""

if __name__ == "__main__":  # before slow imports
    import sys

    sys.path[0] = __file__.rpartition("scripts")[0]
    from scripts.cli.guard import start

    sys.exit(start("train_qa", sys.argv[1:]))

from pathlib import Path

from jsonargparse import Namespace

import gpt2
import lora
from gpt2.data.examples import is_within
from gpt2.training import snapshots

from .cli.guard import Arguments, guarded
from .cli.options import AtLeastOne, add_options, add_scoring, build, parse, parser, training
from .page import page
from .runs import answers, data, folder, processes, resume, scores, train

DEMO = Path(__file__).resolve().parent / "configs" / "demo.yaml"


def options_of(argv: Arguments) -> Namespace:
    """The options, checked."""
    to = parser("train_qa", __doc__)
    add_options(to, str(data.ARTICLE), "qa")
    add = to.add_argument
    add("--tasks", type=str, nargs="+", help="data files, one an adapter")
    add("--prompts", type=str | None, help="file; its answers are references")
    add("--logging_steps", type=AtLeastOne, default=5, help="steps between lines")
    add_scoring(to)
    to.add_class_arguments(gpt2.RunConfig, skip={"folder"}, as_group=False)
    to.add_class_arguments(gpt2.GenerateConfig, "generate", skip={"seed"}, as_group=False)

    file, words = resume.config(argv or [], DEMO)
    options = parse(to, words, file)

    scores.check(options)
    if options.validation is None and (options.patience or options.eval_every):
        raise ValueError("patience and eval_every need validation data: give --validation.")
    if options.tasks and options.generate.num_beams > 1:
        raise ValueError("--tasks routes rows, so generate.num_beams must be 1.")
    if processes.restarts("MAX_RESTARTS") and options.res_path is None and not options.resume:
        raise ValueError("torchrun's --max_restarts needs --res_path.")
    data.shares(options)  # may raise
    build(gpt2.RunConfig, options, folder=folder.NUMBERED)
    return options


@guarded
@processes.joined()
def main(argv: Arguments = None) -> None:
    """Load, inject, baseline answers, train, answers, record, page."""
    clock = folder.Clock()
    with processes.agreed():
        options = options_of(argv)
        config, names = training(options), train.names_of(options.tasks)
        sampling = build(gpt2.GenerateConfig, options.generate, seed=options.seed)
        tasks = names if options.tasks else []
        start = resume.decide(options, "qa", tasks or [folder.ADAPTER])
        sources = data.read(options)
        prompts = data.prompts_of(sources, options)
        reader = data.Reader(options, options.model_name, options.base_dropout)
        model, console = reader.model, reader.console
        splits = {n: reader.split(f, config) for n, f in zip(names, sources, strict=True)}
        counts = {"base": lora.count_parameters(model)}
        missing = train.inject(reader, splits, start)
        counts["LoRA"] = lora.count_parameters(model)
        ids = reader.encode_prompts(prompts, sampling)

    for name, count in counts.items():
        console.print(f"{name}: {count}", soft_wrap=True)
    clock.lap("load")

    with lora.disabled(model):
        baseline = [] if processes.rank() else [*answers.continued(model, ids, sampling)]
    clock.lap("base answers")

    with resume.begun(start, options) as root:
        results = {
            name: train.train_one(reader, name, splits[name], config, start, root)
            for name in missing
        }
        if processes.rank():
            return

        clock.lap("training")
        routes = [*names, dict.fromkeys(names, 1 / len(names))] if options.tasks else []
        tuned = [*answers.continued(model, ids, sampling, routes=routes)]
        clock.lap("tuned answers")

        heads = ["base", *names, "mixture"] if options.tasks else ["base", "tuned"]
        rows_of_ids = [[*old, *new] for old, new in zip(baseline, tuned, strict=True)]
        texts = [[*map(reader.tokenizer.decode, row)] for row in rows_of_ids]
        side = data.shares(options)["train"]
        examples = [e for many in sources.values() for e in many if is_within(e, side)]
        rows = answers.compare(prompts, heads, texts, examples)
        if not options.tasks:
            whole = all(len(examples) < data.FIRST for examples in sources.values())
            answers.judge(rows, tuned, sampling, whole=whole)

        facts = folder.about(options, model, clock, [s.train for s in splits.values()])
        facts |= {"parameters": counts, **results.get(train.ALONE, {})}
        if options.tasks:
            facts["mixture"] = train.mixed(reader, splits)
        facts |= answers.publish(rows, root, console)
        adapters = [root / name for name in names] if options.tasks else [root]
        prompt = min((p.text for p in prompts), key=len, default="Once upon a time")
        use = folder.commands(adapters, options.model_name, prompt)
        folder.write(root, {**facts, "commands": {"use": use}})
        page.write(root)
        for name in names:
            snapshots.remove(train.directory_of(root, name))
    folder.end(console, root, use)
