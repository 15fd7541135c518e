"""What a run's folder tells of it, ended or killed: one plain value for the report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..runs import folder

Row = dict[str, Any]
STEP = frozenset({"step", "loss", "tokens", "seconds"})  # what the report asks of each row
TRIAL = frozenset({"place", "trial", "state", "params", "rung", "losses", "ended"})
CURVE = frozenset({"trial", "training"})


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run.

    Args:
        name: the folder's.
        asked: the options.
        run: what was recorded at its end; of a run that was killed nothing.
        steps: a row a step.
        parts: of a run with `--tasks` its adapters.
        board, curves: of a search its trials, and their losses by step.
        place: the folder, as it was named.
    """

    name: str
    place: Path
    asked: Mapping[str, Any]
    run: Mapping[str, Any] = field(default_factory=dict[str, Any])
    steps: list[Row] = field(default_factory=list[Row])
    parts: list[Record] = field(default_factory=list["Record"])
    board: list[Row] = field(default_factory=list[Row])
    curves: list[Row] = field(default_factory=list[Row])

    @property
    def kind(self) -> str:
        """`search`, `tasks` or `single`."""
        if "space" in self.asked:
            return "search"
        return "tasks" if self.asked.get("tasks") else "single"

    @property
    def validation(self) -> dict[int, float]:
        """The loss on held-out data by step."""
        told = self.run.get("validation", {}).get("losses")
        if told is not None:
            return {int(step): loss for step, loss in told.items()}
        return {s["step"]: s["validation"] for s in self.steps if s.get("validation") is not None}

    @property
    def best_step(self) -> int | None:
        """The step whose weights were kept; of a killed run the best so far."""
        if "validation" in self.run:
            return self.run["validation"]["best_step"]
        found = {step: loss for step, loss in self.validation.items() if loss == loss and step}
        return min(found, key=found.__getitem__) if found else None

    @property
    def tokens_a_second(self) -> float | None:
        """Supervised tokens over the seconds of training."""
        if not self.steps or not self.steps[-1]["seconds"]:
            return None
        return sum(step["tokens"] for step in self.steps) / self.steps[-1]["seconds"]


def read(place: Path) -> Record:
    """The record of a run's folder.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: a file of it is not what a run writes.
    """
    run = _mapping(place / folder.RUN)
    if (
        not run
        and not (place / folder.OPTIONS).is_file()
        and not (place / folder.METRICS).is_file()
    ):
        raise FileNotFoundError(
            f"{place} holds no run: name a folder of train_qa.py or search.py, which has "
            f"{folder.OPTIONS} and, at its end, {folder.RUN}."
        )
    asked = run.get("config") or _mapping(place / folder.OPTIONS)
    if not isinstance(asked, dict) or not isinstance(asked.get("tasks") or [], list):
        raise ValueError(f"{place}: the options of the run are not what a run writes.")
    names = [Path(file).stem for file in asked.get("tasks") or ()]
    found = [place / name for name in names if (place / name / folder.METRICS).is_file()]
    return Record(
        name=place.resolve().name,
        place=place,
        asked=asked,
        run=run,
        steps=list(_lines(place / folder.METRICS, STEP)),
        parts=[read(part) for part in found],
        board=list(_lines(place / folder.LEADERBOARD, TRIAL)),
        curves=list(_lines(place / folder.CURVES, CURVE)),
    )


def _mapping(file: Path) -> Row:
    """What a JSON or YAML file holds; a run that was killed has no record."""
    if not file.is_file():
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        found = yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)
    except (ValueError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged: a run writes a mapping there.")
    return found


def _lines(file: Path, wanted: frozenset[str]) -> Iterator[Row]:
    """The lines of a file; the last may be cut, where the run was killed while it wrote."""
    if not file.is_file():
        return
    rows = file.read_bytes().decode("utf-8", "replace").splitlines()
    for number, row in enumerate(rows, 1):
        try:
            found = json.loads(row)
        except ValueError:
            if number == len(rows):
                return
            raise ValueError(f"{file}, line {number}, is not JSON.") from None
        if not isinstance(found, dict) or not found.keys() >= wanted:
            raise ValueError(f"{file}, line {number}, is no row with {', '.join(sorted(wanted))}.")
        yield found
