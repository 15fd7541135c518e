"""`train_qa.py --tasks a.jsonl b.jsonl`: an adapter a task on one base, and all their answers.

All answers come from one batch, in which each row is under the base, an adapter or their mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import Namespace
from rich.console import Console

import folder
import gpt2
import inputs
import keeping
import lock
import lora
import options as opts
import report
import results


def run(
    options: Namespace,
    training: gpt2.TrainConfig,
    sampling: gpt2.GenerateConfig,
    tokenizer: gpt2.Tokenizer,
    device: str,
    console: Console,
) -> None:
    """Train an adapter on each file, save it under the file's name, and compare.

    All files are read and all adapters are made before the first is trained.

    Raises:
        ValueError: two files of one name, or what reading, training and generating raise.
    """
    names = named(options.tasks)
    if sampling.num_beams > 1:
        raise ValueError("--tasks routes each row of a batch, so generate.num_beams must be 1.")
    folder.check(options.res_path, overwrite=options.overwrite, adapters=names)
    examples, prompts = inputs.read(options.tasks, options)
    model = inputs.base(options, device)
    data = [inputs.encode(texts, tokenizer, model, options) for texts in examples]
    for name in names:
        opts.inject(model, options, name)
    ids = inputs.encode_prompts(prompts, tokenizer, model, sampling, options.separator)
    place = folder.prepare(options.res_path, names)
    for name, dataset in zip(names, data, strict=True):
        lora.activate(model, name)
        told = f"{name}: {report.examples_line(dataset)} {lora.count_parameters(model)}"
        console.print(told, soft_wrap=True)
        fit = gpt2.fit(model, dataset, training)
        with lock.held(place), keeping.saved(fit, place / name, adapter=name):
            report.follow(fit, fit, [], console, every=options.logging_steps)

    if prompts:
        answer(model, names, prompts, ids, sampling, tokenizer, console, place)
    report.end(console, place, [place / name for name in names], options.model_name, prompts)


def answer(
    model: gpt2.GPT2,
    names: list[str],
    prompts: list[gpt2.Example],
    ids: list[list[int]],
    sampling: gpt2.GenerateConfig,
    tokenizer: gpt2.Tokenizer,
    console: Console,
    place: Path,
) -> None:
    """Show and write what the base, each adapter and their mixture say to each prompt."""
    mixture = dict.fromkeys(names, 1 / len(names))
    columns = {"base": None, **{name: name for name in names}, "mixture": mixture}
    with torch.no_grad(), lora.routed(model, [column for _ in ids for column in columns.values()]):
        rows = gpt2.generate(model, [row for row in ids for _ in columns], sampling)
    texts = [tokenizer.decode(row) for row in rows]
    answers = [texts[i : i + len(columns)] for i in range(0, len(texts), len(columns))]
    shown = [example.prompt for example in prompts]
    console.print(report.task_table(shown, list(columns), answers))
    markdown = results.markdown_table(
        ["prompt", *columns], [[p, *row] for p, row in zip(shown, answers, strict=True)]
    )
    (place / folder.ANSWERS).write_text(markdown, encoding="utf-8")


def named(files: Sequence[str]) -> list[str]:
    """The adapters' names: the files', without their endings."""
    names = [Path(file).stem for file in files]
    if len({*names, "base", "mixture"}) < len(names) + 2:
        raise ValueError(
            "--tasks needs files of different names, none of them base or mixture, "
            f"got {', '.join(files)}."
        )
    return names
