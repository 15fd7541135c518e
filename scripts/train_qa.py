"""Tune a GPT-2 on questions and answers with LoRA, and show its answers before and after."""

from __future__ import annotations

import sys
from dataclasses import asdict
from inspect import signature
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

import cli
import gpt2
import lora
import report
import results
import tasks

DATA = Path(__file__).parent / "data"


def parse(argv: cli.Arguments) -> Namespace:
    """The script's own options, and the library's under the names and defaults it gives them."""
    parser = ArgumentParser(prog="train_qa.py", description=__doc__, exit_on_error=False)
    add = parser.add_argument
    add("--config", action="config", help="YAML file of options; flags after it win")
    add("--model_name", default="demo", help="demo, gpt2, org/repo, a folder or a file")
    add("--device", type=str | None, help="by default the GPU if there is one")
    add("--data", default=str(DATA / "article.jsonl"), help="JSONL file to train on")
    add("--tasks", nargs="+", help="JSONL files: train an adapter on each, on one base")
    add("--prompts", default=str(DATA / "article_prompts.jsonl"), help="JSONL file to try out")
    longest = signature(gpt2.encode).parameters["max_length"].default
    batch = gpt2.TrainConfig.batch_size
    add("--max_token_length", type=int, default=longest, help="longer examples are cut")
    add("--train_batch_size", type=int, default=batch, help="examples a batch")
    add("--logging_steps", type=int, default=5, help="steps between two lines of output")
    add("--res_path", default="runs/qa", help="folder to save everything in")
    parser.add_function_arguments(
        gpt2.encode, skip={"examples", "tokenizer", "max_length"}, as_group=False
    )
    parser.add_class_arguments(gpt2.TrainConfig, skip={"batch_size"}, as_group=False)
    parser.add_function_arguments(
        lora.inject, "lora", skip={"model", "adapter", "seed", "dtype"}, as_group=False
    )
    parser.add_class_arguments(gpt2.GenerateConfig, "generate", skip={"seed"}, as_group=False)
    options = parser.parse_args(argv)
    if options.logging_steps < 1:
        raise ValueError(f"logging_steps must be at least 1, got {options.logging_steps}.")
    return options


@cli.guarded
def main(argv: cli.Arguments = None) -> None:
    """Parse, build, train, show, save."""
    options, console, clock = parse(argv), Console(), results.Clock()
    training = cli.build(gpt2.TrainConfig, options, batch_size=options.train_batch_size)
    sampling = cli.build(gpt2.GenerateConfig, options.generate, seed=options.seed)
    tokenizer, device = gpt2.Tokenizer(), cli.pick_device(options.device)
    if options.tasks:
        tasks.run(options, training, sampling, tokenizer, device, console)
        return
    examples = gpt2.read_jsonl(options.data)
    prompts = [e.prompt + e.completion for e in gpt2.read_jsonl(options.prompts)]
    data = cli.encode(examples, tokenizer, options)
    model = gpt2.GPT2.from_pretrained(options.model_name, device=device)
    counts = {"base": lora.count_parameters(model)}
    lora.inject(model, seed=options.seed, **options.lora)
    counts["LoRA"] = lora.count_parameters(model)
    folder = results.prepare(Path(options.res_path))
    console.print(report.parameter_table(counts))
    clock.lap("load")

    ids = [tokenizer.encode(prompt) for prompt in prompts]
    with lora.disabled(model):
        base = gpt2.generate(model, ids, sampling)
    clock.lap("base answers")
    with results.saved(model, folder / results.ADAPTER):
        steps = results.recorded(gpt2.train(model, data, training), folder)
        total = gpt2.total_steps(len(data), training)
        losses = report.follow(steps, console, total=total, every=options.logging_steps)
        clock.lap("training")
        tuned = gpt2.generate(model, ids, sampling)
        clock.lap("tuned answers")

    stopped = [len(row) < sampling.max_new_tokens for row in tuned]
    before, after = ([tokenizer.decode(row) for row in rows] for rows in (base, tuned))
    answers = report.compare(prompts, before, after, stopped, examples)
    console.print(report.answer_table(answers), report.score(answers))
    results.write(
        folder,
        losses=losses,
        every=options.logging_steps,
        answers=answers,
        run={
            "config": {k: v for k, v in options.as_dict().items() if k != "config"},
            "device": device,
            "parameters": {name: asdict(count) for name, count in counts.items()},
            "data": {"examples": len(data), "tokens": data.n_tokens, "truncated": data.truncated},
            "seconds": clock.laps,
        },
    )
    console.print(f"Saved in {folder}: {', '.join(sorted(f.name for f in folder.iterdir()))}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
