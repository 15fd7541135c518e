"""What a run shows: tables, and the progress of training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import folder
import gpt2
import lora
from answers import Answer


def parameter_table(counts: Mapping[str, lora.ParameterCount]) -> Table:
    """Total and trainable parameters of each model."""
    table = Table("model", title="Parameters")
    for heading in ("total", "trainable", "trainable %"):
        table.add_column(heading, justify="right")
    for name, count in counts.items():
        share = 100 * count.trainable / count.total
        table.add_row(name, f"{count.total:,}", f"{count.trainable:,}", f"{share:.4f}")
    return table


def answer_table(answers: Iterable[Answer]) -> Table:
    """The prompts with what the base and the tuned model say."""
    table = Table(title="Answers", show_lines=True)
    for heading, width in (("prompt", 3), ("base", 4), ("tuned", 4), ("as trained?", 2)):
        table.add_column(heading, ratio=width, overflow="fold")
    for a in answers:
        style = "green" if a.verdict.startswith("exact") else ""
        cells = (a.prompt, a.base.strip(), a.tuned.strip())  # as Text: nothing in it is markup
        table.add_row(*map(Text, cells), Text(a.verdict, style=style))
    return table


def task_table(
    prompts: Sequence[str], columns: Sequence[str], answers: Sequence[Sequence[str]]
) -> Table:
    """The prompts with the answer under each adapter."""
    table = Table(title="One batch, many adapters", show_lines=True)
    for heading in ("prompt", *columns):
        table.add_column(Text(heading), ratio=1, overflow="fold")
    for prompt, row in zip(prompts, answers, strict=True):
        table.add_row(Text(prompt), *(Text(answer.strip()) for answer in row))
    return table


def examples_line(data: gpt2.Dataset) -> str:
    """How much there is to learn, and how many examples were cut."""
    said = f"{len(data):,} examples, {data.n_tokens:,} tokens"
    if data.truncated:
        said += (
            f"; {data.truncated:,} ({data.truncated / len(data):.1%}) were longer than "
            f"{data.lengths.max()} and were cut: see --max_token_length"
        )
    return f"{said}."


def end(
    console: Console,
    place: Path,
    adapters: Sequence[Path],
    base: str,
    prompts: Sequence[gpt2.Example],
) -> None:
    """Where everything is, and the commands that use it, unbroken so that they can be copied."""
    names = ", ".join(sorted(file.name for file in place.iterdir()))
    console.print(f"Saved in {place}: {names}", soft_wrap=True)
    prompt = min((e.prompt for e in prompts), key=len, default="Once upon a time")
    console.print("To use it:", soft_wrap=True)
    console.print(folder.next_commands(place, adapters, base, prompt), soft_wrap=True)


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


def follow(
    run: gpt2.Fit,
    steps: Iterable[gpt2.StepRecord],
    losses: list[float],
    console: Console,
    *,
    every: int,
) -> None:
    """Run the training and show how it goes.

    Args:
        run: the training.
        steps: what it yields.
        losses: gets the loss of each step.
        console: gets a line every few steps, and below them a progress bar if it is a terminal.
        every: steps a line; its loss is their mean.
    """
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    tokens, before, shown = 0, None if losses else 0.0, len(losses)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=run.total, completed=len(losses))
        for step in steps:
            if not losses and run.evaluated:
                console.print(f"step     0 · validation {run.evaluated[0]:.4f}")
            losses.append(step.loss)
            if before is None:  # what an earlier process took is no part of this one's speed
                before, tokens = step.seconds, -step.tokens
            tokens += step.tokens
            speed = f"{tokens / max(step.seconds - before, 1e-9):,.0f} tokens/s"
            found = "" if step.validation is None else f" · validation {step.validation:.4f}"
            bar.update(task, advance=1, description=f"loss {step.loss:.4f}{found} · {speed}")
            if len(losses) % every == 0 or len(losses) == run.total or found:
                recent = losses[shown:]
                shown, mean = len(losses), sum(recent) / len(recent)
                console.print(f"step {shown:>5} · loss {mean:.4f}{found} · {speed}")
    if len(losses) < run.total:
        console.print(f"Stopped after step {len(losses)}: the validation loss fell no more.")
