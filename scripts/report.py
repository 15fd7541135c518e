"""What a run shows: tables, and the progress of training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import gpt2
import lora


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the base and the tuned model say to one prompt.

    Args:
        prompt: the prompt.
        base, tuned: how the two continue it.
        stopped: whether the tuned model ended its answer by itself.
        trained: the continuations of this prompt that it was trained on.
    """

    prompt: str
    base: str
    tuned: str
    stopped: bool
    trained: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """How the tuned answer compares with what was trained."""
        if not self.trained:
            return "not trained"
        if self.tuned in self.trained:
            return "exact" if self.stopped else "exact, cut off"
        goes_on = any(self.tuned.startswith(answer) for answer in self.trained)
        return "exact, then goes on" if goes_on else "differs"


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
        table.add_column(heading, ratio=1, overflow="fold")
    for prompt, row in zip(prompts, answers, strict=True):
        table.add_row(Text(prompt), *(Text(answer.strip()) for answer in row))
    return table


def score(answers: Iterable[Answer]) -> str:
    """How many of the trained prompts were answered word for word, in words."""
    verdicts = [a.verdict for a in answers if a.trained]
    return f"{verdicts.count('exact')} of {len(verdicts)} trained prompts answered word for word."


def follow(
    steps: Iterable[gpt2.StepRecord], console: Console, *, total: int, every: int
) -> list[float]:
    """Run the training and show how it goes.

    Args:
        steps: what it yields.
        console: gets a line every few steps, and below them a progress bar if it is a terminal.
        total: steps of the run.
        every: steps a line; its loss is their mean.

    Returns:
        The loss of each step.
    """
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    losses: list[float] = []
    tokens = 0
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=total)
        for step in steps:
            losses.append(step.loss)
            tokens += step.tokens
            speed = f"{tokens / step.seconds:,.0f} tokens/s"
            bar.update(task, advance=1, description=f"loss {step.loss:.4f} · {speed}")
            if len(losses) % every == 0 or len(losses) == total:
                recent = losses[-(len(losses) % every or every) :]
                mean = sum(recent) / len(recent)
                console.print(f"step {len(losses):>5} · loss {mean:.4f} · {speed}", highlight=False)
    return losses


def compare(
    prompts: Sequence[str],
    base: Sequence[str],
    tuned: Sequence[str],
    stopped: Sequence[bool],
    examples: Iterable[gpt2.Example],
) -> list[Answer]:
    """The answers beside what the examples that begin with the same prompt go on with."""
    texts = [example.prompt + example.completion for example in examples]
    return [
        Answer(
            prompt=prompt,
            base=before,
            tuned=after,
            stopped=ended,
            trained=tuple(t.removeprefix(prompt) for t in texts if t.startswith(prompt)),
        )
        for prompt, before, after, ended in zip(prompts, base, tuned, stopped, strict=True)
    ]
