"""What a run's folder holds, in one plain record; of a run that was killed, what there is.

No torch here: a report is made wherever the folder is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Row = dict[str, Any]
FILES = ("run.json", "metrics.jsonl", "options.yaml")


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run as its folder tells of it.

    Args:
        name: the folder's own name.
        place: the folder, as it was named.
        config: the options.
        run: what the run wrote when it ended; empty of one that was killed.
        metrics: a row a step.
        trials: of a search, a row each, the best first.
        curves: of a search, a row a trial.
        parts: of several adapters, the record of each.
    """

    name: str
    place: str
    config: Row
    run: Row
    metrics: list[Row]
    trials: list[Row] = field(default_factory=list[Row])
    curves: list[Row] = field(default_factory=list[Row])
    parts: tuple[Record, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.run)

    def line(self, key: str) -> list[tuple[int, float]]:
        """A metric by step, without the steps that have none."""
        return [(row["step"], row[key]) for row in self.metrics if row.get(key) is not None]

    @property
    def held_out(self) -> list[tuple[int, float]]:
        """The held-out loss by step, that before the first step too where it is known."""
        known = self.run.get("validation", {}).get("losses", {})
        evaluated = {int(step): loss for step, loss in known.items()}
        return sorted({**dict(self.line("validation")), **evaluated}.items())

    @property
    def best(self) -> tuple[int, float] | None:
        """The best step and its held-out loss."""
        finite = [(step, loss) for step, loss in self.held_out if loss == loss and step]
        step = self.run.get("validation", {}).get("best_step")
        chosen = [pair for pair in finite if pair[0] == step]
        return next(iter(chosen), min(finite, key=lambda pair: (pair[1], pair[0]), default=None))


def read(place: Path) -> Record:
    """The record of a folder.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: a file is not what a run writes.
    """
    adapters = sorted(p for p in _folders(place) if (p / "metrics.jsonl").is_file())
    if not adapters and not any((place / name).is_file() for name in FILES):
        raise FileNotFoundError(f"{place} holds no run: it has none of {', '.join(FILES)}.")
    run = _json(place / "run.json")
    config = run.get("config") or _options(place / "options.yaml")
    return Record(
        name=place.resolve().name,
        place=str(place),
        config=config,
        run=run,
        metrics=_lines(place / "metrics.jsonl"),
        trials=_lines(place / "leaderboard.jsonl"),
        curves=_lines(place / "curves.jsonl"),
        parts=tuple(read(p) for p in adapters) if not (place / "metrics.jsonl").is_file() else (),
    )


def _folders(place: Path) -> Sequence[Path]:
    return [p for p in place.iterdir() if p.is_dir()] if place.is_dir() else []


def _json(file: Path) -> Row:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is not the record of a run: it holds no object.")
    return found


def _options(file: Path) -> Row:
    if not file.is_file():
        return {}
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _lines(file: Path) -> list[Row]:
    """The rows of a file; a killed run's last line may be cut, and is left out."""
    if not file.is_file():
        return []
    lines, rows = file.read_text(encoding="utf-8", errors="replace").splitlines(), list[Row]()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{file}, line {number}, is not JSON.") from None
    return rows
