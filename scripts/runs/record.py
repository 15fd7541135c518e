"""The record of a run, run.json, and what is shown when it begins and ends."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

import gpt2
import lora

from ..cli.console import table
from . import folder


class Clock:
    """Seconds between laps, by their names."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = perf_counter()

    def lap(self, name: str) -> None:
        """End a lap."""
        now = perf_counter()
        self.laps[name], self._last = round(now - self._last, 3), now


def about(options: Namespace, model: gpt2.GPT2, clock: Clock) -> dict[str, Any]:
    """What is known of any run beside its results."""
    device = next(model.parameters()).device
    weights = str(next(model.parameters()).dtype).removeprefix("torch.")
    machine = {"processor": platform.machine(), "cores": os.cpu_count() or 0, "weights": weights}
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    versions |= {name: version(name) for name in ("numpy", "safetensors", "tiktoken")}
    config = {name: value for name, value in options.as_dict().items() if name != "config"}
    facts = {"config": config, "device": str(device), "machine": machine}
    return {**facts, "versions": versions, "seconds": clock.laps}


def write(place: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a run, whole or not at all, since it means that the run has ended."""
    text = json.dumps(record, indent=2, ensure_ascii=False, default=asdict)
    folder.write_whole(place / folder.RUN, f"{text}\n")


def write_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a line of JSON a row."""
    with file.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def parameter_table(counts: Mapping[str, lora.ParameterCount]) -> Table:
    """Total and trainable parameters of each model."""
    rows = [
        (name, f"{c.total:,}", f"{c.trainable:,}", f"{100 * c.trainable / c.total:.4f}")
        for name, c in counts.items()
    ]
    return table("Parameters", ("model", "total", "trainable", "trainable %"), rows)


def examples_line(data: gpt2.Dataset) -> str:
    """How much there is to train on, and how many examples were cut."""
    line = f"{len(data):,} examples, {data.n_tokens:,} tokens"
    if data.truncated:
        share = f"{data.truncated:,} ({data.truncated / len(data):.1%})"
        line += f"; {share} were longer than {data.longest} and were cut: see --max_token_length"
    return f"{line}."


def end(console: Console, place: Path, use: str) -> None:
    """Where everything is, and the commands that use it, unbroken so that they can be copied."""
    names = ", ".join(sorted(file.name for file in place.iterdir()))
    for line in (f"Saved in {place}: {names}", "To use it:", use):
        console.print(line, soft_wrap=True)
