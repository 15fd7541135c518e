"""What outlives a run: its metrics, line by line, and its adapters, however it ends."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

import gpt2
import lora

from ..cli import bars, cli
from . import folder, processes, shown, stopping
from .inputs import Reader
from .validation import Apart


def fitted(
    reader: Reader,
    apart: Apart,
    training: gpt2.TrainConfig,
    place: Path,
    places: folder.Places,
    *,
    resume: bool | None = None,
) -> tuple[gpt2.Fit, list[float]]:
    """Train what is active on the model, as the options say; gives the run and its losses.

    Args:
        reader: has model, options and console.
        apart: the data.
        training: how.
        place: the folder of its metrics and snapshots.
        places: those of its adapter.
        resume: go on from the snapshot in `place`; by default as the options say.
    """
    model, options = reader.model, reader.options
    resume = bool(options.resume) if resume is None else resume
    run, unseen = cli.build(gpt2.RunConfig, options, folder=place), apart.held_out
    groups = None
    if options.b_ratio != 1:
        groups = lora.parameter_groups(model, training.lr, b_ratio=options.b_ratio)
    given = {"groups": groups, "validation": unseen, "run": run, "resume": resume}
    fit = gpt2.fit(model, apart.learnt, training, **given)
    if processes.rank():  # the first shows and writes for all
        return fit, [record.loss for record in fit]
    return fit, train(fit, place, places, reader.console, options.logging_steps)


def train(
    run: gpt2.Fit, place: Path, saved_in: folder.Places, console: Console, every: int
) -> list[float]:
    """Take the steps, shown and recorded, and save the adapter; gives the loss of each step."""
    losses = earlier_losses(run, place)
    with saved(run, saved_in):
        bars.follow(run, recorded(run, place), losses, console, every=every)
    if run.evaluated:
        console.print(shown.validation_table(run))
    return losses


@contextmanager
def saved(run: gpt2.Fit, places: folder.Places) -> Iterator[None]:
    """Save the adapter when the block ends, also when training is interrupted or fails.

    With validation data that is the best one, and the last lies in its own place.
    """
    try:
        yield
        _save(run, places)
    except BaseException as stop:
        stopping.leaving()
        if run.taken:
            stop.add_note(_rescue(run, places))
            if not isinstance(stop, RuntimeError | ValueError):
                stop.add_note(_snapshot(run, places))
        raise


def _save(run: gpt2.Fit, places: folder.Places) -> None:
    with run.best_weights():
        lora.save(run.model, places.best, adapter=places.adapter)
    if run.best_step is not None:
        with run.last_weights():
            lora.save(run.model, places.last, adapter=places.adapter)


def _rescue(run: gpt2.Fit, places: folder.Places) -> str:
    """Save the adapter in its place, or else where temporary files go; say where."""
    reasons: list[str] = []
    elsewhere = Path(tempfile.gettempdir(), f"lora-gpt2-{os.getpid()}", places.adapter)
    for chosen in (places, replace(places, best=elsewhere, last=elsewhere / folder.LAST)):
        try:
            _save(run, chosen)
        except (OSError, ValueError, RuntimeError) as error:
            reasons.append(str(error))
        else:
            if run.best_step is None:
                return f"The adapter as it was after step {run.taken} is saved in {chosen.best}."
            return (
                f"The best adapter, of step {run.best_step}, is saved in {chosen.best}, "
                f"the last, of step {run.taken}, in {chosen.last}."
            )
    return f"The adapter cannot be saved either: {'; '.join(reasons)}."


def _snapshot(run: gpt2.Fit, places: folder.Places) -> str:
    """Keep a snapshot if that can be; say how to go on."""
    try:
        run.save()
    except OSError as error:
        return f"The snapshot cannot be saved: {error}."
    return f"Go on with --resume {places.run}." if run.saved_step else ""


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
