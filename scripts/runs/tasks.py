"""`train_qa.py --tasks a.jsonl b.jsonl`: an adapter a task on one base, and all their answers.

All answers come from one batch, in which each row is under the base, an adapter or their mixture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

import gpt2
import lora
from gpt2.training import fingerprints, snapshots
from gpt2.training.packing import settled

from ..cli import options as opts
from ..page import page
from . import (
    continuing,
    folder,
    inputs,
    inside,
    keeping,
    processes,
    results,
    shown,
    starting,
    validation,
)
from .answers import sample
from .folder import RUN

MADE_OF = "made_of"


def run(
    names: list[str],
    sources: Sequence[inputs.Source],
    prompts: list[inputs.Asked],
    reader: inputs.Reader,
    training: gpt2.TrainConfig,
    sampling: gpt2.GenerateConfig,
) -> None:
    """Train an adapter on each file, save it under the file's name, and compare.

    All files are read and all adapters are made before the first is trained. Of a run that is gone
    on with, those that were trained to their end are read.

    Raises:
        ValueError: what reading, training and generating raise.
    """
    model, options, clock = reader.model, reader.options, results.Clock()
    counts = {"base": lora.count_parameters(model)}
    if sampling.num_beams > 1:
        raise ValueError("--tasks routes each row of a batch, so generate.num_beams must be 1.")
    with processes.agreed():
        data = [validation.apart(source, reader) for source in sources]
        ended = {n for n in names if options.resume and (Path(options.res_path, n, RUN)).is_file()}
        _check_trained(options, {n: a for n, a in zip(names, data, strict=True) if n in ended})
        for name in names:
            if name in ended:
                lora.load(model, Path(options.res_path, name), adapter=name)
            else:
                opts.inject(model, options, name)
        training = settled(model, training)
        for apart in data:
            gpt2.total_steps(apart.learnt, training)  # raises what is wrong with it
        ids = inputs.encode_prompts(prompts, reader.tokenizer, model, sampling, options.separator)
    clock.lap("load")
    with starting.begun(options, names) as place:
        for name, apart in zip(names, data, strict=True):
            if name not in ended:
                train(name, apart, place / name, reader, training)
        if processes.rank():
            return  # the first goes on alone
        clock.lap("training")
        told = answer(model, names, prompts, ids, sampling, reader, place) if prompts else []
        clock.lap("answers")
        counts["LoRA"] = lora.count_parameters(model)
        about = results.about(reader, counts, *(apart.learnt for apart in data))
        about |= {"seconds": clock.laps, "answers": known(told, prompts, sources)}
        commands = finish(place, [place / name for name in names], about, prompts)
    shown.end(reader.console, place, commands)


def finish(
    place: Path, adapters: list[Path], about: dict[str, Any], prompts: Sequence[inputs.Asked]
) -> dict[str, str]:
    """Write the record of all, and the report; gives the commands that use what was made."""
    asked, base = [prompt.prompt for prompt in prompts], about["config"]["model_name"]
    commands = folder.commands(place, adapters, base, asked)
    results.write_record(place, {**about, "versions": results.versions(), "commands": commands})
    page.write(place)
    for own in adapters:
        snapshots.remove(own)  # the run is over
    return commands


def train(
    name: str,
    apart: validation.Apart,
    place: Path,
    reader: inputs.Reader,
    training: gpt2.TrainConfig,
) -> None:
    """Train one adapter, as if it were alone, or go on with it; its folder holds all of it."""
    model, options = reader.model, reader.options
    lora.activate(model, name)
    told = f"{name}: {shown.examples_line(apart.learnt)}{apart.told}"
    reader.console.print(f"{told} {lora.count_parameters(model)}", soft_wrap=True)
    if not processes.rank():
        place.mkdir(exist_ok=True)
    resume = bool(options.resume) and any((place / file).is_file() for file in snapshots.NAMES)
    places = folder.Places(name, place.parent, place, place / folder.LAST)
    fit, losses = keeping.fitted(reader, apart, training, place, places, resume=resume)
    if not processes.rank():
        told = {
            MADE_OF: _made_of(apart),
            **results.trained(fit, losses, options.logging_steps),
            **validation.test(model, apart, reader),
            **inside.measured(model, apart, reader.tokenizer),
        }
        results.write_record(place, told)


def answer(
    model: gpt2.GPT2,
    names: list[str],
    prompts: list[inputs.Asked],
    ids: list[list[int]],
    sampling: gpt2.GenerateConfig,
    reader: inputs.Reader,
    place: Path,
) -> list[dict[str, str]]:
    """Show and write what the base, each adapter and their mixture say to each prompt."""
    mixture = dict.fromkeys(names, 1 / len(names))
    columns = {"base": None, **{name: name for name in names}, "mixture": mixture}
    at_once = max(1, continuing.rows_of(next(model.parameters()).device.type) // len(columns))
    said: list[list[str]] = []
    for first in range(0, len(ids), at_once):  # of many prompts some at a time
        some = ids[first : first + at_once]
        routes = [column for _ in some for column in columns.values()]
        own = replace(sampling, seed=sampling.seed + first * len(columns))
        with torch.no_grad(), lora.routed(model, routes):
            rows = gpt2.generate(model, [row for row in some for _ in columns], own)
        texts = [reader.tokenizer.decode(row) for row in rows]
        said += [texts[i : i + len(columns)] for i in range(0, len(texts), len(columns))]
    answers = [[a.prompt, *row] for a, row in zip(prompts, said, strict=True)]
    some, headings = sample(answers), ["prompt", *columns]
    reader.console.print(shown.task_table(headings, some, len(answers)))
    markdown = results.markdown_table(headings, some)
    (place / folder.ANSWERS).write_text(markdown, encoding="utf-8")
    if len(some) < len(answers):
        lines = (dict(zip(headings, row, strict=True)) for row in answers)
        results.write_lines(place / folder.ALL_ANSWERS, lines)
    return [dict(zip(headings, row, strict=True)) for row in some]


def known(
    said: Sequence[dict[str, str]],
    prompts: Sequence[inputs.Asked],
    sources: Sequence[inputs.Source],
) -> list[dict[str, Any]]:
    """The answers, each with those that the files give to its prompt."""
    given = {asked.prompt: [*asked.references] for asked in prompts}
    for example in (e for source in sources for e in source.examples if e.prompt in given):
        given[example.prompt].append(example.completion)
    return [{**row, "references": [*dict.fromkeys(given[row["prompt"]])]} for row in said]


def named(files: Sequence[str]) -> list[str]:
    """The adapters' names: the files', without their endings."""
    names = [Path(file).stem for file in files]
    if len({*names, "base", "mixture"}) < len(names) + 2:
        raise ValueError(
            "--tasks needs files of different names, none of them base or mixture, "
            f"got {', '.join(files)}."
        )
    return names


def _made_of(apart: validation.Apart) -> dict[str, str]:
    return fingerprints.of_data(apart.learnt, apart.held_out)


def _check_trained(options: Namespace, ended: Mapping[str, validation.Apart]) -> None:
    """The error of adapters that were trained on other data than is there now."""
    odd: list[str] = []
    for name, apart in ended.items():
        record = json.loads(Path(options.res_path, name, RUN).read_text(encoding="utf-8"))
        if record.get(MADE_OF) != _made_of(apart):
            odd.append(name)
    if odd:
        raise ValueError(
            f"{', '.join(odd)}: the data is not what they were trained on. Give what the run in "
            f"{options.res_path} was begun with, or begin anew in another folder."
        )
