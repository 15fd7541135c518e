"""`train_qa.py --tasks a.jsonl b.jsonl`: an adapter a task on one base, and all their answers.

All answers come from one batch, in which each row is under the base, an adapter or their mixture.
"""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace
from rich.console import Console

import cli
import gpt2
import lora
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

    Raises:
        ValueError: two files of one name, or what reading, training and generating raise.
    """
    files = {Path(file).stem: Path(file) for file in options.tasks}
    if len({*files, "base", "mixture"}) < len(options.tasks) + 2:
        raise ValueError(
            "--tasks needs files of different names, none of them base or mixture, "
            f"got {options.tasks}."
        )
    examples = {name: gpt2.read_jsonl(file) for name, file in files.items()}
    prompts = [e.prompt + e.completion for e in gpt2.read_jsonl(options.prompts)]
    model = gpt2.GPT2.from_pretrained(options.model_name, device=device)
    folder = results.prepare(Path(options.res_path))
    for name, texts in examples.items():
        data = cli.encode(texts, tokenizer, options)
        lora.inject(model, adapter=name, seed=options.seed, **options.lora)
        console.print(f"{name}: {len(data)} examples, {lora.count_parameters(model)}")
        total = gpt2.total_steps(len(data), training)
        with results.saved(model, folder / name, adapter=name):
            steps = gpt2.train(model, data, training)
            report.follow(steps, console, total=total, every=options.logging_steps)

    mixture = dict.fromkeys(files, 1 / len(files))
    columns = {"base": None, **{name: name for name in files}, "mixture": mixture}
    rows = [column for _ in prompts for column in columns.values()]
    ids = [tokenizer.encode(prompt) for prompt in prompts for _ in columns]
    with lora.routed(model, rows):
        texts = [tokenizer.decode(row) for row in gpt2.generate(model, ids, sampling)]
    answers = [texts[i : i + len(columns)] for i in range(0, len(texts), len(columns))]
    console.print(report.task_table(prompts, list(columns), answers))
    markdown = results.markdown_table(
        ["prompt", *columns], [[p, *row] for p, row in zip(prompts, answers, strict=True)]
    )
    (folder / results.ANSWERS).write_text(markdown, encoding="utf-8")
    console.print(f"Saved in {folder}: {', '.join([*files, results.ANSWERS])}")
