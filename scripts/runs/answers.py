"""What base and adapters answer, beside what was trained on and the references."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import gpt2
import lora

from ..cli.console import bar, table
from . import folder
from .data import Prompt
from .record import write_lines

Answer = dict[str, Any]
Answers = Sequence[list[list[int]]]  # token ids: of each prompt, under each of some adapters
Routes = Sequence[str | Mapping[str, float] | None]
ROWS = {"cpu": 64, "mps": 64}  # rows that are continued at once, on a larger device more
SHOWN = 12  # answers that are shown of many
FACTS = ("prompt", "stopped", "trained", "references", "searched", "verdict")


def rows_of(model: gpt2.GPT2) -> int:
    """How many rows are continued at once by default."""
    return ROWS.get(next(model.parameters()).device.type, 512)


@torch.no_grad()
def continued(
    model: gpt2.GPT2,
    ids: Sequence[list[int]],
    config: gpt2.GenerateConfig,
    rows: int,
    *,
    first: int = 0,
    routes: Routes = (),
) -> Iterator[Answers]:
    """What follows the prompts from the first one on, so many rows at a time for lack of memory.

    Prompt i draws with seed + i, in whatever batch it is. Each prompt is under each of the routes,
    in one batch; by default under what is active in the model.
    """
    each = len(routes) or 1
    at_once = max(1, rows // (each * config.num_beams))
    for start in range(first, len(ids), at_once):
        batch = [row for row in ids[start : start + at_once] for _ in range(each)]
        own = replace(config, seed=config.seed + start * each)
        with lora.routed(model, [*routes] * (len(batch) // each)) if routes else nullcontext():
            made = gpt2.generate(model, batch, own)
        yield [made[i : i + each] for i in range(0, len(made), each)]


def ask(
    model: gpt2.GPT2,
    ids: Sequence[list[int]],
    config: gpt2.GenerateConfig,
    console: Console,
    routes: Routes = (),
) -> Answers:
    """All of `continued`, with a bar where it takes more than one batch."""
    answers: list[list[list[int]]] = []
    many = len(ids) * (len(routes) or 1) > rows_of(model)
    with bar(console, "prompts", len(ids)) if many else nullcontext() as advance:
        for batch in continued(model, ids, config, rows_of(model), routes=routes):
            answers += batch
            if advance:
                advance(len(batch))
    return answers


def compare(
    prompts: Sequence[Prompt],
    heads: Sequence[str],
    texts: Sequence[Sequence[str]],
    examples: Iterable[gpt2.Example],
) -> list[Answer]:
    """Each prompt's answers, beside what the examples that begin so go on with."""
    whole = sorted((e.prompt + e.completion, i) for i, e in enumerate(examples))

    def trained(prompt: str) -> list[str]:
        at = bisect_left(whole, (prompt, 0))  # those that begin so stand together
        same = takewhile(lambda pair: pair[0].startswith(prompt), whole[at:])
        return [text[len(prompt) :] for text, _ in sorted(same, key=lambda pair: pair[1])]

    answers: list[Answer] = []
    for prompt, row in zip(prompts, texts, strict=True):
        known = {"trained": trained(prompt.text), "references": list(prompt.references)}
        answers.append({"prompt": prompt.text, **dict(zip(heads, row, strict=True)), **known})
    return answers


def judged(answer: Answer, *, stopped: bool, searched: bool) -> Answer:
    """The answer with a verdict on what was tuned, by what was trained or else the references.

    The model may have stopped by itself; all that was trained on may have been searched.
    """
    known, text = answer["trained"] or answer["references"], answer["tuned"]
    verdict = "differs"
    if text in known:
        verdict = "exact" if stopped else "exact, cut off"
    elif any(text.startswith(start) for start in known):
        verdict = "exact, then goes on"
    if not answer["trained"]:
        unknown = "not trained" if searched else "not compared"
        source = "not trained; reference" if searched else "reference"
        verdict = f"{source}: {verdict}" if known else unknown
    return {**answer, "stopped": stopped, "searched": searched, "verdict": verdict}


def score(answers: Sequence[Answer]) -> str:
    """How many of the trained prompts were answered word for word, and of the other references."""
    trained = [a["verdict"] for a in answers if a["trained"]]
    others = [a["verdict"] for a in answers if a["references"] and not a["trained"]]
    parts: list[str] = []
    if trained or not others:
        exact = trained.count("exact")
        parts.append(f"{exact:,} of {len(trained):,} trained prompts answered word for word.")
    if others:
        exact, which = (
            sum(v.endswith(": exact") for v in others),
            "others" if trained else "prompts",
        )
        parts.append(f"{exact:,} of {len(others):,} {which} answered as a reference.")
    return " ".join(parts)


def publish(answers: Sequence[Answer], place: Path, console: Console) -> dict[str, Any]:
    """Show and write the answers, or a sample of many; gives what the record has of them."""
    if not answers:
        return {"answers": []}
    few = answers[:: -(-len(answers) // SHOWN)]
    columns = [name for name in few[0] if name not in FACTS]
    verdict = {"verdict": "as trained?"} if "verdict" in few[0] else {}
    heads = ["prompt", *columns, *verdict.values()]
    rows = [[a["prompt"], *(a[c].strip() for c in columns), *(a[v] for v in verdict)] for a in few]
    result = score(answers) if verdict else ""
    of = f", {len(few)} of {len(answers):,}" if len(few) < len(answers) else ""
    title, ratios = ("Answers", [3, 4, 4, 2]) if verdict else ("One batch, many adapters", None)
    console.print(table(f"{title}{of}", heads, rows, ratios or [1] * len(heads)), result)
    lines = [heads, ["---"] * len(heads), *(list(map(_markdown_cell, row)) for row in rows)]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    many = f" {of[2:]}; all are in {folder.ALL_ANSWERS}." if of else ""
    text = f"{result}{many}\n\n{text}" if result else text
    (place / folder.ANSWERS).write_text(text, encoding="utf-8")
    if of:
        write_lines(place / folder.ALL_ANSWERS, answers)
    return {"answers": few} | ({"score": result} if result else {})


def _markdown_cell(text: str) -> str:
    for plain, escaped in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("\n", "<br>")):
        text = text.strip().replace(plain, escaped)
    return text
