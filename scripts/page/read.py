"""A run's folder as one value; the run may have been killed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..runs import folder

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run, or a search with its trials."""

    name: str
    options: Row
    run: Row  # run.json
    steps: list[Row]
    validation: Mapping[int, float]  # losses by step
    best_step: int | None  # whose weights are kept
    board: list[Row]
    tasks: list["Record"]  # one each


def read(root: Path) -> Record:
    """The record of a run's folder."""
    files = (folder.RUN, folder.OPTIONS, folder.METRICS)
    if not any((root / name).is_file() for name in files):
        raise FileNotFoundError(f"{root} holds no run: name a folder of train_qa.py or search.py.")
    run = _mapping(root / folder.RUN)
    options = run.get("config") or _mapping(root / folder.OPTIONS)
    steps = _rows(root / folder.METRICS)
    validation = {s["step"]: s["validation"] for s in steps if "validation" in s}
    best = min(validation, key=validation.__getitem__, default=None)
    if result := run.get("validation"):  # step 0, too
        validation = {int(step): loss for step, loss in result["losses"].items()}
        best = result["best_step"]
    tasks = [root / Path(file).stem for file in options.get("tasks") or ()]
    return Record(
        name=root.resolve().name,
        options=options,
        run=run,
        steps=steps,
        validation=validation,
        best_step=best,
        board=_rows(root / folder.LEADERBOARD),
        tasks=[read(task) for task in tasks if (task / folder.METRICS).is_file()],
    )


def _mapping(file: Path) -> Row:
    text = file.read_text("utf-8") if file.is_file() else "{}"
    try:
        return {**(yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text))}
    except (ValueError, TypeError, yaml.YAMLError):
        raise ValueError(f"{file} is damaged: a run writes a mapping there.") from None


def _rows(file: Path) -> list[Row]:
    """The rows of a file; the last may be cut."""
    lines = file.read_bytes().decode("utf-8", "replace").splitlines() if file.is_file() else []
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{file}, line {number}, is damaged.") from None
    return rows
