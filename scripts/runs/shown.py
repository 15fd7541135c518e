"""What a run shows when it begins and when it ends: tables, and lines of what is where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

import gpt2
import lora

from .answers import Answer, sample


def parameter_table(counts: Mapping[str, lora.ParameterCount]) -> Table:
    """Total and trainable parameters of each model."""
    table = Table("model", title="Parameters")
    for heading in ("total", "trainable", "trainable %"):
        table.add_column(heading, justify="right")
    for name, count in counts.items():
        share = 100 * count.trainable / count.total
        table.add_row(name, f"{count.total:,}", f"{count.trainable:,}", f"{share:.4f}")
    return table


def answer_table(answers: Sequence[Answer]) -> Table:
    """The prompts, or a sample of many, with what the base and the tuned model say."""
    shown = sample(answers)
    of = "" if len(shown) == len(answers) else f", {len(shown)} of {len(answers):,}"
    table = Table(title=f"Answers{of}", show_lines=True)
    for heading, width in (("prompt", 3), ("base", 4), ("tuned", 4), ("as trained?", 2)):
        table.add_column(heading, ratio=width, overflow="fold")
    for a in shown:
        style = "green" if a.verdict.startswith("exact") else ""
        cells = (a.prompt, a.base.strip(), a.tuned.strip())  # as Text: nothing in it is markup
        table.add_row(*map(Text, cells), Text(a.verdict, style=style))
    return table


def task_table(columns: Sequence[str], shown: Sequence[Sequence[str]], of: int) -> Table:
    """The prompts, perhaps a sample of so many, with the answer under each adapter."""
    few = "" if len(shown) == of else f", {len(shown)} of {of:,}"
    table = Table(title=f"One batch, many adapters{few}", show_lines=True)
    for heading in columns:
        table.add_column(Text(heading), ratio=1, overflow="fold")
    for prompt, *row in shown:
        table.add_row(Text(prompt), *(Text(answer.strip()) for answer in row))
    return table


def examples_line(data: gpt2.Dataset) -> str:
    """How much there is to learn, and how many examples were cut."""
    said = f"{len(data):,} examples, {data.n_tokens:,} tokens"
    if data.truncated:
        said += (
            f"; {data.truncated:,} ({data.truncated / len(data):.1%}) were longer than "
            f"{data.longest} and were cut: see --max_token_length"
        )
    return f"{said}."


def end(console: Console, place: Path, commands: Mapping[str, str]) -> None:
    """Where everything is, and the commands that use it, unbroken so that they can be copied."""
    names = ", ".join(sorted(file.name for file in place.iterdir()))
    console.print(f"Saved in {place}: {names}", soft_wrap=True)
    console.print("To use it:", soft_wrap=True)
    console.print(commands["use"], soft_wrap=True)


def validation_table(run: gpt2.Fit) -> Table:
    """The validation loss before the first step, of the best step and of the last."""
    table = Table("adapter", title="Validation")
    for heading in ("step", "loss", "perplexity"):
        table.add_column(heading, justify="right")
    last = max(run.evaluated)
    for name, step in {"none": 0, "best": run.best_step, "last": last}.items():
        if step is not None:
            loss = run.evaluated[step]
            found = gpt2.Evaluation(loss=loss, tokens=1, examples=1).perplexity
            table.add_row(name, f"{step:,}", f"{loss:.4f}", f"{found:,.2f}")
    return table
