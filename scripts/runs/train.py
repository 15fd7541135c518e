"""The training of one adapter, and its saving, however it ends."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console

import gpt2
import lora
from gpt2.training import snapshots

from ..cli.console import bar
from ..cli.options import build
from . import answers, folder, processes, resume, scores
from .data import Reader, Split

ALONE = "default"  # the name of a single adapter
MIXTURE = "mixture"
MADE_OF = "made_of"


def names_of(files: list[str] | None) -> list[str]:
    """The adapters' names: the files' without suffixes, or one."""
    names = [Path(file).stem for file in files or ()]
    if len({*names, "base", "mixture"}) < len(names) + 2:
        raise ValueError(
            f"--tasks needs different names, not base or mixture: got {', '.join(files or ())}."
        )
    return names or [ALONE]


def directory_of(root: Path, name: str) -> Path:
    """The directory of an adapter's metrics."""
    return root if name == ALONE else root / name


def inject(reader: Reader, splits: Mapping[str, Split], start: resume.Start) -> list[str]:
    """Load the trained adapters, inject the others; returns the latter."""
    model, options, root = reader.model, reader.options, Path(start.root or "")
    files = {name: root / name / folder.RUN for name in splits if start.resume}
    ended = {n: json.loads(f.read_text("utf-8")) for n, f in files.items() if f.is_file()}
    if odd := [n for n, run in ended.items() if run.get(MADE_OF) != splits[n].made_of]:
        raise ValueError(
            f"{', '.join(odd)}: the data has changed. Give the old data, or name a new folder."
        )
    for name in splits:
        if name in ended:
            lora.load(model, root / name, adapter=name)
        else:
            lora.inject(model, adapter=name, seed=options.seed, **options.lora)
    return [name for name in splits if name not in ended]


def train_one(
    reader: Reader,
    name: str,
    split: Split,
    config: gpt2.TrainConfig,
    start: resume.Start,
    root: Path,
) -> dict[str, Any]:
    """Train, save and measure one adapter; returns its part of the record."""
    model, options, console = reader.model, reader.options, reader.console
    alone, directory = name == ALONE, directory_of(root, name)
    lora.activate(model, name)
    if not processes.rank():
        directory.mkdir(exist_ok=True)

    rates = {"b_ratio": options.b_ratio}
    groups = lora.parameter_groups(model, config.lr, **rates) if options.b_ratio != 1 else None
    again = start.resume and (alone or (directory / snapshots.NAME).is_file())

    run = build(gpt2.RunConfig, options, folder=directory)
    how: dict[str, Any] = {"groups": groups, "validation": split.validation, "run": run}
    if options.score is not None:
        how |= {"score": scores.named(options.score), "prompts": options.score_prompts}
        how["choose_by"] = options.choose_by
    fit = gpt2.fit(model, split.train, config, **how, resume=again)

    steps = f"{fit.total:,} steps, by {options.config}.{split.message}"
    line = f"{folder.examples_line(split.train)} {steps}"
    console.print(line if alone else f"{name}: {line}", soft_wrap=True)
    if processes.rank():  # writes nothing
        for step in fit:
            _ = step.loss  # as the first does: all end at one step
        return {}

    files = {Path(file).stem: file for file in options.tasks or ()}
    notes = {
        "data": Path(files.get(name, options.data)).name,
        "seed": options.seed,
        "command": f"train_qa.py --config {folder.OPTIONS}",
    }
    with saved(fit, name, root, notes):
        follow(fit, directory, console, options.logging_steps)

    results = {"steps": fit.taken, MADE_OF: split.made_of, **_evaluated(reader, split, fit)}
    results |= answers.measure(model, split, reader.tokenizer)
    if not alone:
        folder.write(directory, results)
    return results


def _evaluated(reader: Reader, split: Split, fit: gpt2.Fit) -> dict[str, Any]:
    results: dict[str, Any] = {}
    if fit.evaluated:
        steps = {"first": 0, "best": fit.best_step, "last": max(fit.evaluated)}
        losses = [f"{n} {fit.evaluated[s]:.4f}" for n, s in steps.items() if s is not None]
        reader.console.print(f"Validation: loss {', '.join(losses)}, best step {fit.best_step}")
        results["validation"] = {"losses": fit.evaluated, "best_step": fit.best_step}
    if fit.scorer:
        result = scores.result(fit, reader.options.score)
        reader.console.print(f"Score: {scores.line(result)}; {fit.scoring:.1f} s in all.")
        results["scores"] = result
    if split.test is not None:
        test = gpt2.evaluate(reader.model, split.test, autocast=reader.options.autocast)
        reader.console.print(f"Test: loss {test.loss:.4f}, perplexity {test.perplexity:,.2f}")
        results["test"] = {"loss": test.loss, "tokens": test.tokens}
    return results


def mixed(reader: Reader, splits: Mapping[str, Split]) -> dict[str, dict[str, float]]:
    """Validation losses by task and adapter."""
    model, losses = reader.model, dict[str, dict[str, float]]()
    routes = {name: {name: 1.0} for name in splits} | {
        MIXTURE: dict.fromkeys(splits, 1 / len(splits))
    }
    for task, split in splits.items():
        if split.validation is None:
            continue
        losses[task] = {}
        for name, weights in routes.items():
            with lora.activated(model, weights):
                losses[task][name] = gpt2.evaluate(model, split.validation).loss

        *parts, mixture = losses[task].values()
        of = ", ".join(f"{name} {loss:.4f}" for name, loss in losses[task].items())
        worse = " The mixture is the worst." if mixture > max(parts) else ""
        reader.console.print(f"Validation on {task}: loss {of}.{worse}", soft_wrap=True)
    return losses


def follow(fit: gpt2.Fit, directory: Path, console: Console, every: int) -> None:
    """Take and record the steps; print a line each `every`."""
    tokens, began, recent = 0, perf_counter(), list[float]()
    with bar(console, total=fit.total, completed=fit.start - 1) as advance:
        for step in recorded(fit, directory):
            if step.step == 1 and fit.evaluated:
                score = f" · score {fit.scores[0]:.4g}" if fit.scores else ""
                console.print(f"step     0 · validation {fit.evaluated[0]:.4f}{score}")
            recent.append(step.loss)
            tokens += step.tokens
            speed = f"{tokens / (perf_counter() - began):,.0f} tokens/s"
            score = "" if step.validation is None else f" · validation {step.validation:.4f}"
            score += "" if step.score is None else f" · score {step.score:.4g}"
            advance(1, f"loss {step.loss:.4f}{score} · {speed}")
            if step.step % every == 0 or step.step == fit.total or score:
                mean = sum(recent) / len(recent)
                recent.clear()
                console.print(f"step {step.step:>5} · loss {mean:.4f}{score} · {speed}")
    if fit.taken < fit.total:
        no_more = "score rose" if fit.choose_by == "score" else "validation loss fell"
        console.print(f"Stopped after step {fit.taken}: the {no_more} no more.")


@contextmanager
def saved(fit: gpt2.Fit, name: str, root: Path, notes: Mapping[str, Any]) -> Iterator[None]:
    """Save the adapter, however the block ends."""
    try:
        yield
        _save(fit, name, root, notes)
    except BaseException as stop:
        if not fit.taken:
            raise
        try:
            stop.add_note(_save(fit, name, root, notes))
        except (OSError, ValueError, RuntimeError) as error:
            stop.add_note(f"The adapter cannot be saved either: {error}.")
        if not isinstance(stop, RuntimeError | ValueError):
            try:
                fit.save()
            except (OSError, RuntimeError) as error:
                stop.add_note(f"The snapshot cannot be saved: {error}.")
            if fit.saved_step:
                stop.add_note(f"Go on with --resume {root}.")
        raise


def _save(fit: gpt2.Fit, name: str, root: Path, notes: Mapping[str, Any]) -> str:
    best, taken = fit.best_step, fit.taken
    path = root / (folder.ADAPTER if name == ALONE else name)
    facts = {**notes, "steps": taken if best is None else best}
    if best is not None:
        facts["validation loss"] = f"{fit.evaluated[best]:.4f}"
    if best in fit.scores:
        facts["validation score"] = f"{fit.scores[best]:.4g}"
    with fit.best_weights():
        lora.save(fit.model, path, adapter=name, notes=facts)
    if best is None:
        return f"The adapter of step {taken} is saved in {path}."
    last = directory_of(root, name) / folder.LAST
    with fit.last_weights():
        lora.save(fit.model, last, adapter=name, notes={**notes, "steps": taken})
    where = f"is saved in {path}, the last, of step {taken}, in {last}."
    return f"The best adapter, of step {best}, {where}"


def recorded(fit: gpt2.Fit, directory: Path) -> Iterator[gpt2.StepRecord]:
    """Write each step as a line of JSON."""
    file, rows = directory / folder.METRICS, dict[int, str]()
    if fit.start > 1 and file.exists():  # perhaps torn
        for line in file.read_text("utf-8", "replace").splitlines(keepends=True):
            with suppress(ValueError, LookupError, TypeError):
                rows[int(json.loads(line)["step"])] = line
        kept = [line for step, line in sorted(rows.items()) if step < fit.start]
        folder.write_whole(file, "".join(kept))
    with file.open("a", encoding="utf-8", buffering=1) as stream:
        for step in fit:
            yield step  # first: a disk may be full
            stream.write(json.dumps(step.metrics()) + "\n")
