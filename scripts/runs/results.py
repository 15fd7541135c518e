"""What a run writes when it ends: the plot, the answers and a record of the run."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import gpt2
import lora

from .answers import Answer, sample, score
from .folder import ALL_ANSWERS, ANSWERS, PLOT, RUN
from .inputs import Reader


def about(
    reader: Reader, counts: Mapping[str, lora.ParameterCount], *data: gpt2.Dataset
) -> dict[str, Any]:
    """What is known of a run before it ends."""
    return {
        "config": {k: v for k, v in reader.options.as_dict().items() if k != "config"},
        "device": str(next(reader.model.parameters()).device),
        "parameters": {name: asdict(count) for name, count in counts.items()},
        "machine": machine(reader.model),
        "data": {
            "examples": sum(map(len, data)),
            "tokens": sum(own.n_tokens for own in data),
            "truncated": sum(own.truncated for own in data),
        },
    }


def write(
    folder: Path,
    fit: gpt2.Fit,
    losses: Sequence[float],
    *,
    every: int,
    answers: Sequence[Answer],
    run: Mapping[str, Any],
) -> None:
    """Write what is known at the end: the plot, the answers and the record of the run."""
    plot_losses(losses, every, folder / PLOT, fit.evaluated)
    (folder / ANSWERS).write_text(answers_markdown(answers), encoding="utf-8")
    said = [{**asdict(a), "verdict": a.verdict} for a in sample(answers)]
    outcome = {
        **trained(fit, losses, every),
        "answers": said,
        "score": score(answers),
        "versions": versions(),
    }
    if len(said) < len(answers):
        write_lines(folder / ALL_ANSWERS, ({**asdict(a), "verdict": a.verdict} for a in answers))
    write_record(folder, {**run, **outcome})


def write_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a line of JSON a row."""
    with file.open("w", encoding="utf-8") as made:
        made.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def trained(fit: gpt2.Fit, losses: Sequence[float], every: int) -> dict[str, Any]:
    """What is known of a training that has ended."""
    outcome: dict[str, Any] = {"steps": len(losses), "last_losses": losses[-every:]}
    if fit.evaluated:
        outcome["validation"] = {"losses": fit.evaluated, "best_step": fit.best_step}
    return outcome


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a run, whole or not at all, since it says that the run has ended."""
    text = json.dumps(record, indent=2, ensure_ascii=False, default=str)
    odd = "backslashreplace"  # a path may hold bytes that are no text
    made = folder / f".{RUN}.part"
    try:
        made.write_text(text + "\n", encoding="utf-8", errors=odd)
        os.replace(made, folder / RUN)
    finally:
        made.unlink(missing_ok=True)


class Clock:
    """Seconds between laps, by their names."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = perf_counter()

    def lap(self, name: str) -> None:
        """End a lap."""
        now = perf_counter()
        self.laps[name], self._last = round(now - self._last, 3), now


def plot_losses(
    losses: Sequence[float], every: int, file: Path, evaluated: Mapping[int, float]
) -> None:
    """Draw the loss of each step, the mean of every few, and that on the validation data."""
    from matplotlib.figure import Figure  # slow to import; drawn this way it needs no display

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, color="0.8", label="each step")
    ends = range(every, len(losses) + 1, every)
    means = [sum(losses[end - every : end]) / every for end in ends]
    middles = [end - (every - 1) / 2 for end in ends]
    axes.plot(middles, means, color="tab:blue", label=f"mean of {every} steps")
    if evaluated:
        line = (list(evaluated), list(evaluated.values()))
        axes.plot(*line, color="tab:orange", marker=".", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats a token)", ylim=(0, None))
    axes.legend()
    figure.savefig(file, dpi=150)


def answers_markdown(answers: Sequence[Answer]) -> str:
    """The table of answers, or of a sample of many, in Markdown."""
    shown = sample(answers)
    cells = [(a.prompt, a.base, a.tuned, a.verdict) for a in shown]
    table = markdown_table(("prompt", "base", "tuned", "as trained?"), cells)
    many = f" {len(shown)} of {len(answers):,}; all are in {ALL_ANSWERS}."
    return f"{score(answers)}{many * (len(shown) < len(answers))}\n\n{table}"


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [headings, ["---"] * len(headings), *(list(map(_markdown_cell, row)) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine(model: gpt2.GPT2) -> dict[str, Any]:
    """What computes: the processor, its cores, and the GPU if that is what the model is on."""
    device = next(model.parameters()).device
    weights = str(next(model.parameters()).dtype).removeprefix("torch.")
    found = {"processor": platform.machine(), "cores": os.cpu_count() or 0, "weights": weights}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide the numbers."""
    own = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return own | {name: version(name) for name in ("numpy", "safetensors", "tiktoken")}


def _markdown_cell(text: str) -> str:
    for plain, escaped in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("\n", "<br>")):
        text = text.strip().replace(plain, escaped)
    return text
