"""What outlives a run: its metrics, line by line, and its adapters, however it ends."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

import cli
import folder
import gpt2
import lock
import lora
import report
from gpt2.training import snapshots

TRANSIENT = ("config", "resume", "overwrite", "res_path")  # options of one start, not of the run


def add_options(to: ArgumentParser) -> None:
    """Where the results go, and whether a run is there."""
    place = "folder for the results, by default a new runs/qa-N"
    to.add_argument("--res_path", type=str | None, help=place)
    flag: dict[str, Any] = {"nargs": "?", "const": True, "default": False}
    over = "replace the run that res_path holds"
    to.add_argument("--overwrite", type=bool, help=over, **flag)
    again = "go on with the run of res_path, or of the folder that is named"
    to.add_argument("--resume", type=bool | str, help=again, **flag)


def check(options: Namespace) -> None:
    """Find out, and write nothing, whether the run may be begun or gone on with.

    Raises:
        FileNotFoundError: there is nothing to go on with.
        ValueError: as `folder.check`; another run works there; options that do not go together.
    """
    one = {name: options[name] for name in ("validation", "save_every", "resume")}
    if options.tasks and (given := [name for name, value in one.items() if value]):
        raise ValueError(f"--tasks goes without --{', --'.join(given)}.")
    if options.validation is None and (options.patience or options.eval_every):
        raise ValueError("patience and eval_every need validation data: give --validation.")
    if options.resume:
        named = options.resume if isinstance(options.resume, str) else options.res_path
        if named is None:
            raise ValueError("Name the folder of the run that is to go on: --resume FOLDER.")
        snapshots.check(Path(named))
        options.res_path = named
    elif not options.tasks:
        folder.check(options.res_path, overwrite=options.overwrite)
    place = Path(options.res_path or folder.NUMBERED)
    cli.build(gpt2.RunConfig, options, folder=place)
    if options.res_path and place.is_dir():
        with lock.held(place):
            pass


@contextmanager
def begun(options: Namespace) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The run's folder, for this run alone, with its options; and what `gpt2.fit` is told of it."""
    place = Path(options.res_path) if options.resume else folder.prepare(options.res_path)
    with lock.held(place):
        if not options.resume:
            write_options(options, place)
        run = cli.build(gpt2.RunConfig, options, folder=place)
        try:
            yield place, {"run": run, "resume": bool(options.resume)}
        except BaseException as stop:
            adapter = place / folder.ADAPTER
            if not getattr(stop, "__notes__", ()) and any(adapter.glob("*.safetensors")):
                stop.add_note(f"The trained adapter is in {adapter}.")
            raise
        snapshots.remove(place)  # the run is over


def write_options(options: Namespace, place: Path) -> None:
    """Write the options, so that `--resume FOLDER` needs no other."""
    kept = {name: value for name, value in options.as_dict().items() if name not in TRANSIENT}
    (place / folder.OPTIONS).write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")


def options_file(given: Namespace, default: Path) -> Path:
    """Where options come from that no flag gives: of a run that is gone on with, its own."""
    resumed = given.get("resume")
    place = resumed if isinstance(resumed, str) else given.get("res_path") if resumed else None
    file = Path(place or "", folder.OPTIONS)
    return file if place and file.is_file() else default


def train(run: gpt2.Fit, place: Path, console: Console, every: int) -> list[float]:
    """Take the steps, shown and recorded, and save the adapter; gives the loss of each step."""
    losses = earlier_losses(run, place)
    with saved(run, place / folder.ADAPTER):
        report.follow(run, recorded(run, place), losses, console, every=every)
    if run.evaluated:
        console.print(report.validation_table(run))
    return losses


@contextmanager
def saved(run: gpt2.Fit, place: Path, adapter: str = "default") -> Iterator[None]:
    """Save the adapter when the block ends, also when training is interrupted or fails.

    With validation data that is the best one, and the last lies beside it.

    Args:
        run: the training.
        place: the folder to save the adapter in.
        adapter: its name.
    """
    try:
        yield
        _save(run, place, adapter)
    except BaseException as stop:
        if run.taken:
            stop.add_note(_rescue(run, place, adapter))
            if not isinstance(stop, RuntimeError | ValueError):
                stop.add_note(_snapshot(run))
        raise


def _save(run: gpt2.Fit, place: Path, adapter: str) -> None:
    with run.best_weights():
        lora.save(run.model, place, adapter=adapter)
    if run.best_step is not None:
        with run.last_weights():
            lora.save(run.model, place.with_name(folder.LAST), adapter=adapter)


def _rescue(run: gpt2.Fit, place: Path, adapter: str) -> str:
    """Save the adapter in its place, or else where temporary files go; say where."""
    reasons: list[str] = []
    for chosen in (place, Path(tempfile.gettempdir(), f"lora-gpt2-{os.getpid()}", adapter)):
        try:
            _save(run, chosen, adapter)
        except (OSError, ValueError, RuntimeError) as error:
            reasons.append(str(error))
        else:
            if run.best_step is None:
                return f"The adapter as it was after step {run.taken} is saved in {chosen}."
            last = chosen.with_name(folder.LAST)
            return (
                f"The best adapter, of step {run.best_step}, is saved in {chosen}, "
                f"the last, of step {run.taken}, in {last}."
            )
    return f"The adapter cannot be saved either: {'; '.join(reasons)}."


def _snapshot(run: gpt2.Fit) -> str:
    """Keep a snapshot if that can be; say how to go on."""
    place = run.options.folder
    if place is None:
        return ""
    try:
        run.save()
    except OSError as error:
        return f"The snapshot cannot be saved: {error}."
    return f"Go on with --resume {place}." if run.saved_step else ""


def recorded(run: gpt2.Fit, place: Path) -> Iterator[gpt2.StepRecord]:
    """Write each step as a line of JSON, as it comes."""
    with (place / folder.METRICS).open("a", encoding="utf-8", buffering=1) as file:
        for step in run:
            yield step  # first: if the disk is full, the step counts
            found = {name: value for name, value in asdict(step).items() if value is not None}
            file.write(json.dumps(found) + "\n")


def earlier_losses(run: gpt2.Fit, place: Path) -> list[float]:
    """The losses of the steps before this process; lines of steps that are lost are taken away."""
    file = place / folder.METRICS
    if not run.taken or not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)[: run.told]
    made = file.with_suffix(".part")
    made.write_text("".join(lines), encoding="utf-8")
    os.replace(made, file)
    return [json.loads(line)["loss"] for line in lines]
