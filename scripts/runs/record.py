"""The record of a run, run.json, and what is shown when it begins and ends."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from jsonargparse import Namespace
from rich.console import Console

import gpt2

from . import folder


class Clock:
    """Seconds between laps, by their names."""

    def __init__(self) -> None:
        self.laps, self._last = dict[str, float](), perf_counter()

    def lap(self, name: str) -> None:
        """End a lap."""
        now = perf_counter()
        self.laps[name], self._last = round(now - self._last, 3), now


def about(
    options: Namespace, model: gpt2.GPT2, clock: Clock, data: Sequence[gpt2.Dataset]
) -> dict[str, Any]:
    """What any run has beside its results; `data` is what was trained on."""
    weight = next(model.parameters())
    machine: dict[str, Any] = {"processor": platform.machine(), "cores": os.cpu_count()}
    if weight.is_cuda:
        machine["gpu"] = torch.cuda.get_device_name(weight.device)
    return {
        "config": {name: value for name, value in options.as_dict().items() if name != "config"},
        "device": str(weight.device),
        "machine": machine,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "seconds": clock.laps,
        "data": {
            "examples": sum(map(len, data)),
            "tokens": sum(one.n_tokens for one in data),
            "truncated": sum(one.truncated for one in data),
        },
    }


def write(root: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a run, which means that the run has ended."""
    text = json.dumps(record, indent=2, ensure_ascii=False, default=asdict)
    folder.write_whole(root / folder.RUN, f"{text}\n")


def differences(then: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()) -> str:
    """In which values two records differ, but for free ones; empty for none."""
    now = json.loads(json.dumps(now))  # as it is read back
    names = [n for n in {**then, **now} if n not in free and then.get(n) != now.get(n)]
    return ", ".join(f"{n} was {then.get(n)!r:.80}, is {now.get(n)!r:.80}" for n in names)


def examples_line(data: gpt2.Dataset) -> str:
    """How much there is to train on, and how many examples were cut."""
    line = f"{len(data):,} examples, {data.n_tokens:,} tokens"
    if data.truncated:
        share = f"{data.truncated:,} ({data.truncated / len(data):.1%})"
        line += f"; {share} were longer than {data.longest} and were cut: see --max_token_length"
    return f"{line}."


def end(console: Console, root: Path, use: str) -> None:
    """Where everything is, and the commands that use it."""
    names = ", ".join(sorted(file.name for file in root.iterdir()))
    for line in (f"Saved in {root}: {names}", "To use it:", use):
        console.print(line, soft_wrap=True)
