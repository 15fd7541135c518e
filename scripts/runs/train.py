"""The training of one adapter: alone, or one of several on the same base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gpt2
import lora

from ..cli.console import table
from ..cli.options import build
from . import adapter_stats, folder, processes, record, resume, saving
from .data import Reader, Split
from .saving import ALONE, Target

MADE_OF = "made_of"


def names_of(files: Sequence[str] | None) -> list[str]:
    """The adapters' names: one, or the files' without their endings."""
    names = [Path(file).stem for file in files or ()]
    if len({*names, "base", "mixture"}) < len(names) + 2:
        raise ValueError(
            "--tasks needs files of different names, none of them base or mixture, "
            f"got {', '.join(files or ())}."
        )
    return names or [ALONE]


def inject(reader: Reader, splits: Mapping[str, Split], start: resume.Start) -> list[str]:
    """New adapters as the options say; of a run that is resumed those are loaded that have ended.

    Gives the names of those that are still to be trained.
    """
    model, options, place = reader.model, reader.options, Path(start.place or "")
    records = {name: place / name / folder.RUN for name in splits}
    ended = [name for name, file in records.items() if start.resume and file.is_file()]
    made_of = {name: json.loads(records[name].read_text("utf-8")).get(MADE_OF) for name in ended}
    if odd := [name for name in ended if made_of[name] != splits[name].made_of]:
        raise ValueError(
            f"{', '.join(odd)}: the data is not what they were trained on. Give what the run in "
            f"{place} was begun with, or begin anew in another folder."
        )
    for name in splits:
        if name in ended:
            lora.load(model, place / name, adapter=name)
        else:
            lora.inject(model, adapter=name, seed=options.seed, **options.lora)
    return [name for name in splits if name not in ended]


def train_one(
    reader: Reader, split: Split, config: gpt2.TrainConfig, target: Target, start: resume.Start
) -> dict[str, Any]:
    """Train one adapter, save it, and measure what it does; gives its part of the record."""
    model, options, console = reader.model, reader.options, reader.console
    lora.activate(model, target.adapter)
    if not processes.rank():
        target.directory.mkdir(exist_ok=True)
    groups = None
    if options.b_ratio != 1:
        groups = lora.parameter_groups(model, config.lr, b_ratio=options.b_ratio)
    run = build(gpt2.RunConfig, options, folder=target.directory)
    how: dict[str, Any] = {"groups": groups, "validation": split.validation, "run": run}
    again = start.resume and (target.adapter == ALONE or resume.has_snapshot(target.directory))
    fit = gpt2.fit(model, split.train, config, **how, resume=again)
    name = "" if target.adapter == ALONE else f"{target.adapter}: "
    steps = f"{fit.total:,} steps, by {options.config}.{split.message}"
    console.print(f"{name}{record.examples_line(split.train)} {steps}", soft_wrap=True)
    if processes.rank():  # the first shows and writes for all
        for step in fit:
            _ = step.loss  # as the first reads it, so that all end at the same step
        return {}
    files = {Path(file).stem: file for file in options.tasks or ()}
    notes = {
        "data": Path(files.get(target.adapter, options.data)).name,
        "seed": options.seed,
        "command": f"train_qa.py --config {folder.OPTIONS}",
    }
    with saving.saved(fit, target, notes):
        losses = saving.follow(fit, target, console, options.logging_steps)
    results: dict[str, Any] = {"steps": fit.taken, "last_losses": losses[-options.logging_steps :]}
    if fit.evaluated:
        console.print(_validation_table(fit))
        results["validation"] = {"losses": fit.evaluated, "best_step": fit.best_step}
    if split.test is not None:
        test = gpt2.evaluate(model, split.test, autocast=options.autocast)
        console.print(f"Test: loss {test.loss:.4f}, perplexity {test.perplexity:,.2f}")
        results["test"] = {"loss": test.loss, "tokens": test.tokens}
    results |= {MADE_OF: split.made_of, **adapter_stats.measure(model, split, reader.tokenizer)}
    if target.directory != target.run:
        record.write(target.directory, results)
    return results


def _validation_table(fit: gpt2.Fit) -> Any:
    """The validation loss before the first step, of the best step and of the last."""
    steps = {"none": 0, "best": fit.best_step, "last": max(fit.evaluated)}
    rows: list[list[str]] = []
    for name, step in steps.items():
        if step is not None:
            loss = fit.evaluated[step]
            perplexity = gpt2.Evaluation(loss=loss, tokens=1, examples=1).perplexity
            rows.append([name, f"{step:,}", f"{loss:.4f}", f"{perplexity:,.2f}"])
    return table("Validation", ("adapter", "step", "loss", "perplexity"), rows)
