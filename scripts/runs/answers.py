"""Answers of base and adapters, and statistics of an adapter."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import gpt2
import lora

from ..cli.console import table
from . import folder
from .data import Prompt, Split

Answer = dict[str, Any]
Answers = list[list[list[int]]]  # ids by prompt, route
Routes = Sequence[str | Mapping[str, float] | None]
ROWS = {"cpu": 64, "mps": 64}  # at once; elsewhere 512
LOOKED_AT = 16  # examples; the longest is shown
SHOWN = 12  # answers
FACTS = ("prompt", "stopped", "trained", "references", "verdict")


@torch.no_grad()
def continued(
    model: gpt2.GPT2,
    ids: list[list[int]],
    config: gpt2.GenerateConfig,
    rows: int | None = None,
    *,
    first: int = 0,
    routes: Routes = (),
) -> Iterator[list[list[int]]]:
    """Continuations from prompt `first` on; prompt i draws with seed + i."""
    rows = rows or ROWS.get(next(model.parameters()).device.type, 512)
    each = len(routes) or 1
    at_once = max(1, rows // (each * config.num_beams))
    for start in range(first, len(ids), at_once):
        batch = [row for row in ids[start : start + at_once] for _ in range(each)]
        seeded = replace(config, seed=config.seed + start * each)
        with lora.routed(model, [*routes] * (len(batch) // each)) if routes else nullcontext():
            made = gpt2.generate(model, batch, seeded)
        yield from (made[i : i + each] for i in range(0, len(made), each))


def pieces(tokens: Iterable[int], tokenizer: gpt2.Tokenizer) -> Iterator[str]:
    """The text of each token; a character is at its last one."""
    ids, shown = list[int](), ""
    for token in tokens:
        ids.append(token)
        whole = tokenizer.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")
        yield whole[len(shown) :]
        shown = whole
    yield tokenizer.decode(ids)[len(shown) :]


def compare(
    prompts: list[Prompt],
    heads: list[str],
    texts: list[list[str]],
    examples: Iterable[gpt2.Example],
) -> list[Answer]:
    """Each prompt's answers, and completions of the examples that begin with it."""
    whole = sorted((e.prompt + e.completion, i) for i, e in enumerate(examples))
    answers: list[Answer] = []
    for prompt, row in zip(prompts, texts, strict=True):
        start, at = prompt.text, bisect_left(whole, (prompt.text, 0))
        same = takewhile(lambda pair, start=start: pair[0].startswith(start), whole[at:])
        trained = [text[len(start) :] for text, _ in sorted(same, key=lambda pair: pair[1])]
        answer = {"prompt": start, **dict(zip(heads, row, strict=True))}
        answers.append({**answer, "trained": trained, "references": list(prompt.references)})
    return answers


def judge(
    answers: Iterable[Answer], tuned: Answers, config: gpt2.GenerateConfig, *, whole: bool
) -> None:
    """Add verdicts; `whole`: `trained` covers all examples."""
    for answer, (ids,) in zip(answers, tuned, strict=True):
        known, text = answer["trained"] or answer["references"], answer["tuned"]
        answer["stopped"] = len(ids) < config.max_new_tokens
        verdict = "differs"
        if text in known:
            verdict = "exact" if answer["stopped"] else "exact, cut off"
        elif any(text.startswith(start) for start in known):
            verdict = "exact, then goes on"
        if not answer["trained"]:
            parts = ["not trained"] * whole + [f"reference: {verdict}"] * bool(known)
            verdict = "; ".join(parts) or "not compared"
        answer["verdict"] = verdict


def score(answers: list[Answer]) -> str:
    """How many answers are exact, of trained prompts and others."""
    trained = [a["verdict"] for a in answers if a["trained"]]
    others = [a["verdict"] for a in answers if a["references"] and not a["trained"]]
    parts: list[str] = []
    if trained or not others:
        exact = trained.count("exact")
        parts.append(f"{exact:,} of {len(trained):,} trained prompts answered word for word.")
    if others:
        exact = sum(v.endswith(": exact") for v in others)
        which = "others" if trained else "prompts"
        parts.append(f"{exact:,} of {len(others):,} {which} answered as a reference.")
    return " ".join(parts)


def publish(answers: list[Answer], root: Path, console: Console) -> dict[str, Any]:
    """Write the answers and show a few; returns the record's part."""
    if not answers:
        return {"answers": []}
    few = answers[:: -(-len(answers) // SHOWN)]
    judged = "verdict" in few[0]
    names = ["prompt", *(n for n in few[0] if n not in FACTS), *["verdict"] * judged]
    heads = ["as trained?" if name == "verdict" else name for name in names]
    rows = [[a[n] if n == "prompt" else a[n].strip() for n in names] for a in few]
    of = f", {len(few)} of {len(answers):,}" if len(few) < len(answers) else ""
    title = "Answers" if judged else "One batch, many adapters"
    ratios = [3, 4, 4, 2] if judged else [1] * len(heads)
    result = {"score": score(answers)} if judged else {}
    console.print(table(f"{title}{of}", heads, rows, ratios), *result.values())
    cells = [[_markdown(a[name]) for name in names] for a in answers]
    lines = [f"| {' | '.join(line)} |\n" for line in [heads, ["---"] * len(heads), *cells]]
    text = "\n\n".join([*result.values(), "".join(lines)])
    (root / folder.ANSWERS).write_text(text, "utf-8")
    return {"answers": few, **result}


def _markdown(text: str) -> str:
    for plain, escaped in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("\n", "<br>")):
        text = text.strip().replace(plain, escaped)
    return text


def measure(model: gpt2.GPT2, split: Split, tokenizer: gpt2.Tokenizer) -> dict[str, Any]:
    """The adapter's norms, and its effect on a passage."""
    data = split.validation if split.validation is not None else split.train
    few = [data[i][0] for i in range(min(len(data), LOOKED_AT))]
    stats: dict[str, Any] = {"updates": updates(model)}
    if (ids := max(few, key=len, default=None)) is not None and len(ids) > 1:
        with lora.disabled(model):
            base = log_probabilities(model, ids)
        *texts, rest = pieces(ids.tolist(), tokenizer)
        stats["passage"] = {
            "held_out": split.validation is not None,
            "tokens": [*texts[:-1], texts[-1] + rest],
            "base": base,
            "adapter": log_probabilities(model, ids),
        }
    return stats


@torch.no_grad()
def log_probabilities(model: gpt2.GPT2, ids: Tensor) -> list[float]:
    """In nats, without the first token's: `(T - 1,)`."""
    row = ids.to(next(model.parameters()).device)[None]
    logits = model(row[:, :-1]).float()
    values = logits.log_softmax(-1).gather(-1, row[:, 1:, None])
    return [round(value, 4) for value in values.flatten().tolist()]


@torch.no_grad()
def updates(model: gpt2.GPT2) -> list[dict[str, Any]]:
    """Frobenius norms of each active `s · B A` and its weight."""
    return [
        {
            "layer": path,
            "update": float(f"{float((weight * update.delta().float()).norm()):.6g}"),
            "weight": float(f"{float(layer.weight_out_in.float().norm()):.6g}"),
        }
        for path, layer in model.named_modules()
        if isinstance(layer, lora.LoRALinear)
        for update, weight in layer.active_updates()
    ]
