"""The sections of a report: what was asked, how it went, what it answers, how to use it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import changes, limits, replies
from .charts import Chart, Series, finite, means, thinned
from .markup import Markup, joined, table, tag
from .record import Record

Part = Markup | Chart | list[Chart]  # charts of a list stand side by side
Section = tuple[str, str, Sequence[Part]]
KINDS = {"search": "A search", "tasks": "Adapters for several tasks", "single": "A LoRA adapter"}
FACTS = ("device", "machine", "data", "seconds", "versions")
MARKED = "Marked is what the reference does not say; a text that is quite another has no marks."
SIZES = "The size of s·BA as a share of the weight's beside it; both as Frobenius norms."


def head(records: Sequence[Record]) -> Markup:
    """Name, what it is, and the figures that one looks for first."""
    if len(records) > 1:
        names = ", ".join(record.name for record in records)
        return tag("header", tag("h1", f"{len(records)} runs"), tag("p", names))
    (record,) = records
    said = " · ".join(described(record))
    state = [] if record.run else [tag("p", stopped(record), class_="warn")]
    tiles = [
        tag("div", tag("dt", name), tag("dd", value)) for name, value in figures(record).items()
    ]
    return tag("header", tag("h1", record.name), tag("p", said), *state, tag("dl", *tiles))


def described(record: Record) -> Iterator[str]:
    """What it is, on what, of what."""
    asked, form = record.asked, record.asked.get("lora", {})
    yield f"{KINDS[record.kind]} on {asked.get('model_name', 'an unknown base')}"
    yield ", ".join(Path(file).name for file in asked.get("tasks") or [asked.get("data", "?")])
    if form and record.kind != "search":
        yield f"rank {form['r']}, alpha {form['alpha']:g}, {told(form['targets'])}"


def stopped(record: Record) -> str:
    """What is said of a run that has no record."""
    done = f" after {len(record.steps):,} steps" if record.steps else ""
    return f"This run was stopped{done}, before its end: there are no answers. --resume goes on."


def figures(record: Record) -> dict[str, str]:
    """The figures that one looks for first."""
    found: dict[str, str] = {}
    if record.steps:
        found["steps"] = f"{len(record.steps):,}"
        found["last loss"] = number(record.steps[-1]["loss"])
    if (best := record.best_step) is not None and best in record.validation:
        found["held-out loss"] = number(record.validation[best])
    if test := record.run.get("test"):
        found["test loss"] = number(test["loss"])
    if counts := record.run.get("parameters"):
        last = list(counts.values())[-1]
        found["trained"] = f"{100 * last['trainable'] / last['total']:.2f} %"
    if record.tokens_a_second:
        found["tokens a second"] = f"{record.tokens_a_second:,.0f}"
    if record.board:
        found["trials"] = f"{len(record.board):,}"
    for name in ("winner", "default"):
        if name in record.run:
            found[f"{name}'s loss"] = number(record.run[name]["selection"]["mean"])
    if seconds := record.run.get("seconds"):
        found["seconds"] = f"{sum(seconds.values()):,.1f}"
    return found


def of(record: Record) -> Iterator[Section]:
    """The sections of one run."""
    runs = record.parts or [record]
    for run in runs:
        name = f"Training: {run.name}" if record.parts else "Training"
        if run.steps:
            speed = [drawn] if (drawn := limits.bar(run)) else []
            yield name, "", [curve(run), list(rates(run)), *speed]
    if said := record.run.get("answers"):
        yield "Answers", f"{record.run.get('score', '')} {MARKED}".strip(), replies.cards(said)
    for run in runs:
        whose = run.name if record.parts else "the winner" if record.board else "the adapter"
        if found := run.run.get("passage"):
            shown, note = changes.passage(found)
            yield f"What {whose} changed", note, [shown]
        if found := run.run.get("updates"):
            yield f"Where the update of {whose} is", SIZES, [changes.heat(found)]
    yield "Options, data and machine", "", list(asked(record))
    if commands := record.run.get("commands"):
        yield (
            "Commands",
            "",
            [joined(tag("h3", what), tag("pre", line)) for what, line in commands.items()],
        )


def curve(run: Record) -> Chart:
    """The loss of each step, its mean, and that on held-out data."""
    points = [(s["step"], s["loss"]) for s in run.steps]
    few = max(1, len(points) // 40)
    shown = [Series(name="each step", points=thinned(points), look="faint")]
    if few > 1:
        shown.append(Series(name=f"mean of {few} steps", points=means(points, few)))
    marks: list[tuple[float, str]] = []
    if held_out := list(run.validation.items()):
        shown.append(Series(name="held-out", points=held_out, look="both", color="2"))
        if run.best_step is not None:
            marks.append((run.best_step, f"best: step {run.best_step:,}"))
    return Chart(
        name=f"loss {run.name}", title="Loss", unit="nats a token", series=shown, marks=marks
    )


def rates(run: Record) -> Iterator[Chart]:
    """Learning rate and gradient norm."""
    for key, title in (("lr", "Learning rate"), ("grad_norm", "Gradient norm")):
        points = [(s["step"], s[key]) for s in run.steps if key in s]
        unit = "before clipping" if key == "grad_norm" else ""
        line = Series(name="", points=thinned(points))
        yield Chart(name=f"{key} {run.name}", title=title, unit=unit, series=[line], log_y=False)


def asked(record: Record) -> Iterator[Markup]:
    """Options, parameters, data, machine, versions, seconds."""
    run = record.run
    if counts := run.get("parameters"):
        both = [(name, c["total"], c["trainable"]) for name, c in counts.items()]
        rows = [[n, f"{of:,}", f"{own:,}", f"{100 * own / of:.4f}"] for n, of, own in both]
        yield table(["model", "parameters", "trainable", "trainable %"], rows)
    facts = {key: run[key] for key in FACTS if key in run}
    yield pairs(flat(facts))
    yield tag("details", tag("summary", "Every option"), pairs(flat(record.asked)))


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Nested values by dotted names."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = told(value)
    return found


def pairs(values: Mapping[str, str]) -> Markup:
    """Names and values in columns."""
    rows = [tag("div", tag("dt", name), tag("dd", value)) for name, value in values.items()]
    return tag("dl", *rows, class_="pairs")


def told(value: Any) -> str:
    """A value of an option."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        inner = (f"[{told(v)}]" if isinstance(v, list) else told(v) for v in value)
        return ", ".join(inner) or "–"
    return f"{value:,}" if isinstance(value, int) else str(value)


def number(value: float | None) -> str:
    """A loss."""
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4f}"


def compared(records: Sequence[Record]) -> Iterator[Section]:
    """The sections of several runs."""
    yield "Side by side", "", [differences(records), overlaid(records)]


def differences(records: Sequence[Record]) -> Markup:
    """The figures of each, and the options in which they differ."""
    options = [flat(record.asked) for record in records]
    names = [n for n in dict.fromkeys(n for o in options for n in o) if n != "res_path"]
    differ = [n for n in names if len({o.get(n) for o in options}) > 1]
    all_figures = [figures(record) for record in records]
    headings = list(dict.fromkeys(name for own in all_figures for name in own))
    rows = [
        [r.name, *(own.get(h, "") for h in headings), *(o.get(n, "") for n in differ)]
        for r, own, o in zip(records, all_figures, options, strict=True)
    ]
    return table(["run", *headings, *differ], rows)


def overlaid(records: Sequence[Record]) -> Chart:
    """The loss of each, as means; held-out where there is one."""
    shown: list[Series] = []
    for i, record in enumerate(records):
        points = [(s["step"], s["loss"]) for s in record.steps]
        few = max(1, len(points) // 40)
        line = means(points, few) if len(finite(points)) == len(points) else thinned(points)
        shown.append(Series(name=record.name, points=line, color=str(i % 6 + 1)))
    return Chart(name="compared", title="Loss", unit="nats a token, smoothed", series=shown)
