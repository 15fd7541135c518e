"""What outlives a training: each step's metrics, and the adapter, however the training ends."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

import gpt2
import lora

from ..cli.console import bar
from . import folder

ALONE = "default"  # the adapter's name in the model where there is one


@dataclass(frozen=True)
class Target:
    """Where an adapter goes: its name in the model, and the run's folder.

    One of several has a folder of its own there, with metrics and snapshots; beside validation data
    its best weights are saved, and its last.
    """

    adapter: str
    run: Path

    @property
    def directory(self) -> Path:
        """Of metrics and snapshots."""
        return self.run if self.adapter == ALONE else self.run / self.adapter

    @property
    def best(self) -> Path:
        """Of the adapter."""
        return self.run / (folder.ADAPTER if self.adapter == ALONE else self.adapter)

    @property
    def last(self) -> Path:
        """Of the adapter as it was at the end, where the best is another."""
        return self.directory / folder.LAST


def follow(fit: gpt2.Fit, target: Target, console: Console, every: int) -> list[float]:
    """Take the steps, shown and recorded; gives the losses that the metrics have.

    The console gets a line every so many steps, with their mean loss, and below them a bar.
    """
    losses = _earlier_losses(fit, target.directory)
    tokens, seconds, recent = 0, 0.0 if not fit.told else None, list[float]()
    with bar(console, "", fit.total, fit.told) as advance:
        for step in recorded(fit, target.directory):
            if step.step == 1 and fit.evaluated:
                console.print(f"step     0 · validation {fit.evaluated[0]:.4f}")
            losses.append(step.loss)
            recent.append(step.loss)
            if seconds is None:  # what an earlier process took is no part of this one's speed
                seconds, tokens = step.seconds, -step.tokens
            tokens += step.tokens
            speed = f"{tokens / max(step.seconds - seconds, 1e-9):,.0f} tokens/s"
            score = "" if step.validation is None else f" · validation {step.validation:.4f}"
            advance(1, f"loss {step.loss:.4f}{score} · {speed}")
            if step.step % every == 0 or step.step == fit.total or score:
                mean = sum(recent) / len(recent)
                recent.clear()
                console.print(f"step {step.step:>5} · loss {mean:.4f}{score} · {speed}")
    if fit.taken < fit.total:
        console.print(f"Stopped after step {fit.taken}: the validation loss fell no more.")
    return losses


@contextmanager
def saved(fit: gpt2.Fit, target: Target, notes: Mapping[str, object]) -> Iterator[None]:
    """Save the adapter when the block ends, also when training is interrupted or fails.

    Its model card says the notes, and what the training came to.
    """
    try:
        yield
        _save(fit, target, notes)
    except BaseException as stop:
        if fit.taken:
            stop.add_note(_saved_so_far(fit, target, notes))
            if not isinstance(stop, RuntimeError | ValueError):
                stop.add_note(_snapshot(fit, target))
        raise


def _save(fit: gpt2.Fit, target: Target, notes: Mapping[str, object]) -> None:
    steps = fit.taken if fit.best_step is None else fit.best_step
    scores = {"validation loss": f"{fit.evaluated[steps]:.4f}"} if steps in fit.evaluated else {}
    with fit.best_weights():
        facts = {**notes, "steps": steps, **scores}
        lora.save(fit.model, target.best, adapter=target.adapter, notes=facts)
    if fit.best_step is not None:
        with fit.last_weights():
            facts = {**notes, "steps": fit.taken}
            lora.save(fit.model, target.last, adapter=target.adapter, notes=facts)


def _saved_so_far(fit: gpt2.Fit, target: Target, notes: Mapping[str, object]) -> str:
    """Save the adapter of a training that was stopped; say where."""
    try:
        _save(fit, target, notes)
    except (OSError, ValueError, RuntimeError) as error:
        return f"The adapter cannot be saved either: {error}."
    if fit.best_step is None:
        return f"The adapter as it was after step {fit.taken} is saved in {target.best}."
    return (
        f"The best adapter, of step {fit.best_step}, is saved in {target.best}, "
        f"the last, of step {fit.taken}, in {target.last}."
    )


def _snapshot(fit: gpt2.Fit, target: Target) -> str:
    """Keep a snapshot if that can be; say how to go on."""
    try:
        fit.save()
    except (OSError, RuntimeError) as error:
        return f"The snapshot cannot be saved: {error}."
    return f"Go on with --resume {target.run}." if fit.saved_step else ""


def recorded(fit: gpt2.Fit, directory: Path) -> Iterator[gpt2.StepRecord]:
    """Write each step as a line of JSON, as it comes."""
    with (directory / folder.METRICS).open("a", encoding="utf-8", buffering=1) as file:
        for step in fit:
            yield step  # first: if the disk is full, the step counts
            row = {name: value for name, value in asdict(step).items() if value is not None}
            file.write(json.dumps(row) + "\n")


def _earlier_losses(fit: gpt2.Fit, directory: Path) -> list[float]:
    """The losses of the steps before this process, as far as the file has them.

    It is only for people: a line that was torn, or whose step will be taken again, goes.
    """
    file, rows = directory / folder.METRICS, dict[int, tuple[str, float]]()
    if not fit.told or not file.exists():
        return []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, LookupError, TypeError):
            row = json.loads(line)
            rows[int(row["step"])] = (line, float(row["loss"]))
    kept = [row for step, row in sorted(rows.items()) if step <= fit.told]
    folder.write_whole(file, "".join(f"{line}\n" for line, _ in kept))
    return [loss for _, loss in kept]
