"""`train_qa.py` on one file: an adapter, and what base and tuned model answer."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gpt2
import lora
from gpt2.training import snapshots
from gpt2.training.packing import settled

from ..cli import options as opts
from ..page import page
from . import (
    answers,
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


def run(
    names: list[str],
    sources: Sequence[inputs.Source],
    prompts: list[inputs.Asked],
    reader: inputs.Reader,
    training: gpt2.TrainConfig,
    sampling: gpt2.GenerateConfig,
) -> None:
    """Train an adapter on the one file; show, save and compare."""
    (source,), model, options, console = sources, reader.model, reader.options, reader.console
    clock, counts = results.Clock(), {"base": lora.count_parameters(model)}
    with processes.agreed():
        apart, training = validation.apart(source, reader), settled(model, training)
        opts.inject(model, options)
        counts["LoRA"] = lora.count_parameters(model)
        ids = inputs.encode_prompts(prompts, reader.tokenizer, model, sampling, options.separator)
        total = gpt2.total_steps(apart.learnt, training)
    line = f"{shown.examples_line(apart.learnt)} {total:,} steps, by {options.config}.{apart.told}"
    console.print(shown.parameter_table(counts), line, sep="\n", soft_wrap=True)
    clock.lap("load")
    tried = functools.partial(continuing.tried, model, ids, sampling, console)
    with lora.disabled(model):
        base = [] if processes.rank() else tried()
    clock.lap("base answers")
    with starting.begun(options, names) as place:
        places = folder.Places("default", place, place / folder.ADAPTER, place / folder.LAST)
        fit, losses = keeping.fitted(reader, apart, training, place, places)
        if processes.rank():
            return  # the first goes on alone
        clock.lap("training")
        texts = answers.decoded(reader.tokenizer, base, tried(), sampling)
        clock.lap("tuned answers")
        learnt = validation.learnt_texts(source, options)
        compared = answers.compare(prompts, *texts, learnt, searched=source.whole)
        if compared:
            console.print(shown.answer_table(compared), answers.score(compared))
        about = {**found(reader, counts, apart, place, prompts), "seconds": clock.laps}
        results.write(place, fit, losses, every=options.logging_steps, answers=compared, run=about)
        page.write(place)
        snapshots.remove(place)  # the run is over
    shown.end(console, place, about["commands"])


def found(
    reader: inputs.Reader,
    counts: Mapping[str, lora.ParameterCount],
    apart: validation.Apart,
    place: Path,
    prompts: Sequence[inputs.Asked],
) -> dict[str, Any]:
    """What the record tells beside losses and answers: what it was, and what the adapter does."""
    asked = [prompt.prompt for prompt in prompts]
    return {
        **results.about(reader, counts, apart.learnt),
        **validation.test(reader.model, apart, reader),
        **inside.measured(reader.model, apart, reader.tokenizer),
        "commands": folder.commands(place, [place], reader.options.model_name, asked),
    }
