"""The sections of a run's report as plain values, which the template lays out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .charts import Chart, Series, finite, means, thinned
from .read import Record, Row

Section = tuple[str, str, list[tuple[str, Any]]]  # title, note, parts: what each is, and its value
FACTS = ("device", "machine", "data", "seconds", "versions")
KNOWN, ABOUT = ("trained", "references"), ("prompt", "stopped", "searched", "verdict")
MOST, STRONGEST = 4.0, 0.45  # nats that get the full colour, and its opacity: text still reads
SIZES = "The size of s·BA as a share of the weight's beside it; both as Frobenius norms."


def described(record: Record) -> list[str]:
    """What it is, on what, of what."""
    options, adapter = record.options, record.options.get("lora", {})
    kind = "Adapters for several tasks" if options.get("tasks") else "A LoRA adapter"
    kind = "A search" if "space" in options else kind
    files = options.get("tasks") or [options.get("data", "?")]
    parts = [f"{kind} on {options.get('model_name', 'an unknown base')}"]
    parts.append(", ".join(Path(file).name for file in files))
    if adapter and "space" not in options:
        targets = shown(adapter["targets"])
        parts.append(f"rank {adapter['r']}, alpha {adapter['alpha']:g}, {targets}")
    return parts


def figures(record: Record) -> dict[str, str]:
    """The figures that one looks for first."""
    run, steps, best = record.run, record.steps, record.best_step
    values: dict[str, str] = {}
    if steps:
        values |= {"steps": f"{len(steps):,}", "last loss": number(steps[-1]["loss"])}
    if best is not None and best in record.validation:
        values["held-out loss"] = number(record.validation[best])
    if test := run.get("test"):
        values["test loss"] = number(test["loss"])
    if counts := run.get("parameters"):
        last = list(counts.values())[-1]
        values["trained"] = f"{100 * last['trainable'] / last['total']:.2f} %"
    if steps and (seconds := steps[-1]["seconds"]):
        values["tokens a second"] = f"{sum(s['tokens'] for s in steps) / seconds:,.0f}"
    if record.board:
        values["trials"] = f"{len(record.board):,}"
    for name in ("winner", "default"):
        if name in run:
            values[f"{name}'s loss"] = number(run[name]["selection"]["mean"])
    if seconds := run.get("seconds"):
        values["seconds"] = f"{sum(seconds.values()):,.1f}"
    return values


def of_run(record: Record) -> Iterator[Section]:
    """The sections of one run."""
    run, runs = record.run, record.tasks or [record]
    for one in runs:
        if one.steps:
            name = f"Training: {one.name}" if record.tasks else "Training"
            yield name, "", [("chart", loss(one)), ("charts", list(_rates(one)))]
    if answers := run.get("answers"):
        yield "Answers", run.get("score", ""), [("answers", [_card(a) for a in answers])]
    for one in runs:
        whose = one.name if record.tasks else "the winner" if record.board else "the adapter"
        if passage := one.run.get("passage"):
            yield f"What {whose} changed", _change(passage), [("passage", _tokens(passage))]
        if updates := one.run.get("updates"):
            yield f"Where the update of {whose} is", SIZES, [("heat", _heat(updates))]
    counts = run.get("parameters", {}).items()
    numbers = [(name, c["total"], c["trainable"]) for name, c in counts]
    rows = [[n, f"{of:,}", f"{own:,}", f"{100 * own / of:.4f}"] for n, of, own in numbers]
    parts = [("table", table(["model", "parameters", "trainable", "trainable %"], rows))]
    facts = flat({key: run[key] for key in FACTS if key in run})
    options = [("pairs", facts), ("details", ("Every option", "pairs", flat(record.options)))]
    yield "Options, data and machine", "", [*(parts if rows else []), *options]
    if commands := run.get("commands"):
        yield "Commands", "", [("commands", commands)]


def of_several(records: Sequence[Record]) -> Iterator[Section]:
    """The figures of each, the options in which they differ, and the losses."""
    options, all_figures = [flat(r.options) for r in records], [figures(r) for r in records]
    names = [n for n in dict.fromkeys(n for o in options for n in o) if n != "res_path"]
    differ = [n for n in names if len({o.get(n) for o in options}) > 1]
    heads = list(dict.fromkeys(name for own in all_figures for name in own))
    rows = [
        [r.name, *(own.get(h, "") for h in heads), *(o.get(n, "") for n in differ)]
        for r, own, o in zip(records, all_figures, options, strict=True)
    ]
    series: list[Series] = []
    for i, record in enumerate(records):
        points = [(s["step"], s["loss"]) for s in record.steps]
        few = max(1, len(points) // 40)
        line = means(points, few) if len(finite(points)) == len(points) else thinned(points)
        series.append(Series(name=record.name, points=line, color=str(i % 6 + 1)))
    chart = Chart(name="compared", title="Loss", unit="nats a token, smoothed", series=series)
    yield "Side by side", "", [("table", table(["run", *heads, *differ], rows)), ("chart", chart)]


def loss(run: Record) -> Chart:
    """The loss of each step, its mean, and that on validation data."""
    points = [(s["step"], s["loss"]) for s in run.steps]
    few = max(1, len(points) // 40)
    series = [Series(name="each step", points=thinned(points), look="faint")]
    if few > 1:
        series.append(Series(name=f"mean of {few} steps", points=means(points, few)))
    marks: list[tuple[float, str]] = []
    if held_out := list(run.validation.items()):
        series.append(Series(name="held-out", points=held_out, look="both", color="2"))
        if run.best_step is not None:
            marks.append((run.best_step, f"best: step {run.best_step:,}"))
    title = {"title": "Loss", "unit": "nats a token"}
    return Chart(name=f"loss {run.name}", **title, series=series, marks=marks)


def _rates(run: Record) -> Iterator[Chart]:
    for key, title, unit in (
        ("lr", "Learning rate", ""),
        ("grad_norm", "Gradient norm", "before clipping"),
    ):
        line = Series(name="", points=thinned([(s["step"], s[key]) for s in run.steps if key in s]))
        yield Chart(name=f"{key} {run.name}", title=title, unit=unit, series=[line], log_y=False)


def _card(answer: Row) -> dict[str, Any]:
    """What base and tuned model answer, and the reference if there is one."""
    known = [text for kind in KNOWN for text in answer.get(kind, ())]
    rows = {name: answer[name].strip() for name in answer if name not in (*KNOWN, *ABOUT)}
    if known:
        rows["reference"] = known[0].strip()
    verdict = answer.get("verdict", "")
    return {"prompt": answer["prompt"].strip(), "verdict": verdict, "rows": rows}


def _change(passage: Row) -> str:
    changes = [after - b for b, after in zip(passage["base"], passage["adapter"], strict=True)]
    known = [change for change in changes if math.isfinite(change)]
    mean = f"{sum(known) / len(known) if known else math.nan:+.3f}".replace("-", "−")
    return (
        f"A {'held-out' if passage['held_out'] else 'learnt'} passage: blue where the adapter "
        "makes the token likelier than the base does, orange where less likely; full colour at "
        f"{MOST:g} nats. {mean} nats a token."
    )


def _tokens(passage: Row) -> list[tuple[str, str, tuple[str, str]]]:
    """Each token's text, its numbers, its colour."""
    first, *others = passage["tokens"]
    tokens = [(first, "", colour(0))]
    for piece, before, after in zip(others, passage["base"], passage["adapter"], strict=True):
        change = after - before
        told = f"base {before:.2f}, adapter {after:.2f}: {change:+.2f} nats".replace("-", "−")
        tokens.append((piece, f"{piece.strip() or 'space'} · {told}", colour(change)))
    return [token for token in tokens if token[0]]


def colour(change: float, most: float = MOST) -> tuple[str, str]:
    """The name of a colour and its opacity."""
    share = min(1.0, abs(change) / most) * STRONGEST if math.isfinite(change) else 0.0
    return "lose" if change < 0 else "gain", f"{share:.2f}"


def _heat(updates: Sequence[Row]) -> dict[str, Any]:
    """The size of each update as a share of its weight's, a row a layer and a column a target."""
    cells: dict[str, dict[str, tuple[float, str]]] = {}
    for row in updates:  # a path without a number is a row of its own
        at = re.fullmatch(r"(?:.*\.)?(\d+)\.(.+)", row["layer"])
        layer, target = (at[1], at[2]) if at else (row["layer"], "update")
        norms = f"‖s·BA‖ {row['update']:g}, ‖W‖ {row['weight']:g}"
        cells.setdefault(layer, {})[target] = (row["update"] / (row["weight"] or math.nan), norms)
    shares = [share for row in cells.values() for share, _ in row.values() if math.isfinite(share)]
    most, targets = (
        max(shares, default=1.0) or 1.0,
        list(dict.fromkeys(t for r in cells.values() for t in r)),
    )

    def cell(share: float, norms: str) -> tuple[str, str, tuple[str, str]]:
        text = f"{100 * share:.3g} %" if math.isfinite(share) else "not finite"
        return text, norms, colour(share, most)

    rows = [(n, [cell(*row[t]) if t in row else None for t in targets]) for n, row in cells.items()]
    return {"targets": targets, "rows": rows}


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], **more: Any) -> dict[str, Any]:
    """A table, and which of its columns are numbers."""
    columns = list(zip(*rows, strict=True)) or [()] * len(heads)
    return {
        "heads": heads,
        "rows": rows,
        "numeric": [all(map(_is_number, c)) for c in columns],
        **more,
    }


def _is_number(cell: str) -> bool:
    return not cell or cell == "not finite" or cell.lstrip("+−-")[:1].isdigit()


def flat(values: Row, before: str = "") -> dict[str, str]:
    """Nested values by dotted names."""
    names: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            names |= flat(value, f"{before}{key}.")
        else:
            names[f"{before}{key}"] = shown(value)
    return names


def shown(value: Any) -> str:
    """A value of an option."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(f"[{shown(v)}]" if isinstance(v, list) else shown(v) for v in value) or "–"
    return f"{value:,}" if isinstance(value, int) else str(value)


def number(value: float | None) -> str:
    """A loss."""
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4f}"
