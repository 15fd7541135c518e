"""What a run's folder tells of it, ended or killed: one plain value for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..runs import folder

Row = Mapping[str, Any]
KEYS = {  # what the report needs of each row of a file
    folder.METRICS: {"step", "loss", "tokens", "seconds"},
    folder.LEADERBOARD: {"place", "trial", "state", "params", "rung", "losses", "ended"},
    folder.CURVES: {"trial", "training"},
}


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run, or a search with its trials and their curves."""

    name: str  # the folder's
    options: Row
    run: Row  # what was recorded at its end; of a run that was killed nothing
    steps: list[Row]
    board: list[Row]
    curves: list[Row]
    tasks: list[Record] = field(default_factory=list["Record"])  # one an adapter

    @property
    def validation(self) -> dict[int, float]:
        """The loss on validation data by step."""
        if "validation" in self.run:
            return {int(step): loss for step, loss in self.run["validation"]["losses"].items()}
        return {s["step"]: s["validation"] for s in self.steps if s.get("validation") is not None}

    @property
    def best_step(self) -> int | None:
        """The step whose weights were kept; of a killed run the best so far."""
        if "validation" in self.run:
            return self.run["validation"]["best_step"]
        finite = {step: loss for step, loss in self.validation.items() if loss == loss}
        return min(finite, key=finite.__getitem__, default=None)

    @property
    def best_loss(self) -> float | None:
        """The validation loss of that step."""
        return self.validation.get(self.best_step or 0)

    @property
    def tokens_a_second(self) -> float:
        """Of training; 0 where it is not known."""
        seconds = self.steps[-1]["seconds"] if self.steps else 0
        return sum(step["tokens"] for step in self.steps) / seconds if seconds else 0


def read(place: Path) -> Record:
    """The record of a run's folder.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: a file in it is not what a run writes.
    """
    files = (folder.RUN, folder.OPTIONS, folder.METRICS)
    if not any((place / name).is_file() for name in files):
        raise FileNotFoundError(
            f"{place} holds no run: name a folder of train_qa.py or search.py, which has "
            f"{folder.OPTIONS} and, at its end, {folder.RUN}."
        )
    run = _mapping(place / folder.RUN)
    options = run.get("config") or _mapping(place / folder.OPTIONS)
    if not isinstance(options, dict) or not isinstance(options.get("tasks") or [], list):
        raise ValueError(f"{place}: the options of the run are not what a run writes.")
    steps, board, curves = (_rows(place / name) for name in KEYS)
    tasks = [place / Path(file).stem for file in options.get("tasks") or ()]
    parts = [read(task) for task in tasks if (task / folder.METRICS).is_file()]
    rows = {"steps": steps, "board": board, "curves": curves}
    return Record(name=place.resolve().name, options=options, run=run, tasks=parts, **rows)


def _mapping(file: Path) -> Row:
    """What a JSON or YAML file holds; nothing where there is no file."""
    if not file.is_file():
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        return {**(yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text))}
    except (ValueError, TypeError, yaml.YAMLError):
        raise ValueError(f"{file} is damaged: a run writes a mapping there.") from None


def _rows(file: Path) -> list[Row]:
    """The rows of a file; the last may be cut, where the run was killed while it wrote."""
    rows: list[Row] = []
    lines = file.read_bytes().decode("utf-8", "replace").splitlines() if file.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append({**json.loads(line)})
            whole = rows[-1].keys() >= KEYS[file.name]
        except (ValueError, TypeError) as error:
            whole = number == len(lines) and isinstance(error, ValueError)
        if not whole:
            names = ", ".join(sorted(KEYS[file.name]))
            raise ValueError(f"{file}, line {number}, is damaged: a run writes {names} there.")
    return rows
