"""What the page of a search shows beside a run's: halving, parameters, curves, leaderboard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from charts import BASE, LEFT, RIGHT, TOP, Axis, Line, frame, line_chart, scale, scatter, thinned
from page import cell, section, table, text, tiles
from record import Record, Row

POINTS = 60_000  # in all curves together, so that the page of 512 trials stays small
DOTS = {"winner": "d1", "finalist": "d0"}


def head(record: Record) -> str:
    """The title, and what may be said of the winner."""
    run = record.run
    won, usual = run.get("winner", {}), run.get("default", {})
    lead = f"{len(record.trials):,} trials on {run.get('machine') or run.get('device', '?')}."
    figures = [("the winner's trial", str(won.get("trial", "?")))]
    for name, found in (("winner", won), ("default", usual)):
        for kind in ("selection", "test"):
            if mean := (found.get(kind) or {}).get("mean"):
                figures.append((f"{name}, mean {kind} loss", f"{mean:.4f}"))
    told = ""
    if others := run.get("not_told_apart"):
        told = f"The winner cannot be told apart from trial {', '.join(map(str, others))}. "
    if verdict := run.get("winner_on_test"):
        words = {"alike": "cannot be told apart from", "better": "is better than"}
        told += f"On the test data it {words.get(verdict, 'is worse than')} the default. "
        told += run.get("told_apart_by", "")
    return (
        f'<header><h1>{text(record.name)}</h1><p class="lead">{text(lead)}</p></header>'
        f"{tiles(figures)}" + (f'<p class="warn">{text(told)}</p>' if told else "")
    )


def tree(record: Record) -> str:
    """The halving: a column a rung, a line a trial, as high as its loss there."""
    rungs = record.run.get("rungs", [])
    if not rungs:
        return ""
    rows = [{int(k): v for k, v in t["losses"].items()} for t in record.trials]
    size = (1000.0, 320.0)
    heights = [v for row in rows for v in row.values() if v is not None]
    x = Axis(1, max(2, len(rungs)), LEFT + 110, size[0] - RIGHT - 110)
    y = scale(heights, size[1] - BASE, TOP, log=min(heights, default=1) > 0, zero=False)
    lines, dots = list[str](), list[str]()
    for trial, row in reversed([*zip(record.trials, rows, strict=True)]):
        known = [(x.at(k), y.at(v)) for k, v in sorted(row.items()) if v is not None]
        style = "c1" if trial["state"] == "winner" else "c0" if len(known) > 1 else "pale"
        if len(known) > 1:
            way = "L".join(f"{a:.1f} {b:.1f}" for a, b in known)
            lines.append(f'<path class="l {style}" d="M{way}"/>')
        dot, said = DOTS.get(trial["state"], "dim"), f"trial {trial['trial']}: {trial['state']}"
        dots += [f'<circle class="{dot}" cx="{a:.1f}" cy="{b:.1f}" r="3.2"><title>{text(said)}'
                 "</title></circle>" for a, b in known]  # fmt: skip
    grid = frame(Axis(0, 1, -99, -99), y, size, "")
    under = "".join(
        f'<text x="{x.at(r["rung"]):.1f}" y="{size[1] - 7:g}" text-anchor="middle">'
        f"rung {r['rung']}: {r['alive']} trials, {r['share']:.1%} of the way</text>"
        for r in rungs
    )
    drawn = f'<svg viewBox="0 0 1000 320" role="img" aria-label="halving">{grid}{under}'
    note = "Each dot is a trial's loss at the end of a rung; a line goes on to the next rung. "
    note += "Those without a line retired. Orange is the winner."
    return section("Halving", f"<figure>{drawn}{''.join(lines + dots)}</svg></figure>", note=note)


def parameters(record: Record) -> str:
    """The loss over each parameter, finalists with their seeds' spread."""
    names = list(dict.fromkeys(name for t in record.trials for name in t["params"]))
    drawn = "".join(_over(name, record.trials) for name in names)
    note = "The loss of each trial at the last rung that it reached: rungs differ in steps, so "
    note += "pale dots stand higher. A bar spans a finalist's seeds."
    return section("Loss over each parameter", f'<div class="pair">{drawn}</div>', note=note)


def _over(name: str, trials: list[Row]) -> str:
    values = [t["params"].get(name) for t in trials]
    numbers = all(isinstance(v, int | float) for v in values)
    shown = [v if numbers else " ".join(v) if isinstance(v, list) else str(v) for v in values]
    kinds = sorted(set(shown), key=str) if not numbers or len(set(shown)) < 7 else []
    kinds = sorted(kinds) if numbers else kinds
    points, whiskers = list[tuple[float, float, str, str]](), list[tuple[float, float, float]]()
    for trial, value in zip(trials, shown, strict=True):
        at = float(kinds.index(value)) if kinds else float(value)
        known = {int(k): v for k, v in trial["losses"].items() if v is not None}
        if not known:
            continue
        loss = known[max(known)]
        said = f"trial {trial['trial']}: {name} {cell(value)}, loss {loss:.4f}, rung {max(known)}"
        points.append((at, loss, DOTS.get(trial["state"], "dim"), said))
        seeds = [v for v in trial.get("seeds", {}).values() if v is not None]
        if seeds:
            whiskers.append((at, min(seeds), max(seeds)))
    log = not kinds and min((p[0] for p in points), default=0) > 0
    cut = [str(k) if len(str(k)) < 22 else str(k)[:20] + "…" for k in kinds]
    drawn = scatter(points, x_name=name, x_log=log, whiskers=whiskers, names=cut)
    return f"<figure><h3>{text(name)}</h3>{drawn}</figure>"


def curves(record: Record) -> str:
    """The training loss of every trial."""
    columns = max(16, min(200, POINTS // (2 * max(1, len(record.curves)))))
    state = {t["trial"]: t["state"] for t in record.trials}
    lines: list[Line] = []
    longest = max((len(c["training"]) for c in record.curves), default=1)
    for c in record.curves:
        loss = [(n, math.nan if v is None else v) for n, v in enumerate(c["training"], 1)]
        own = max(2, columns * len(loss) // longest)
        style = {"winner": "c1", "finalist": "c0"}.get(state.get(c["trial"], ""), "pale")
        lines.append(Line(name=f"trial {c['trial']}", points=thinned(loss, own), style=style))
    lines.sort(key=lambda line: ("pale", "c0", "c1").index(line.style))
    drawn = line_chart("trials", lines, log=True, size=(1000, 340)) if lines else ""
    note = "Training loss of every trial under the first seed; orange is the winner, blue are the "
    return section("All trials", drawn, note=note + "other finalists.")


def leaderboard(record: Record) -> str:
    """All trials, the best first."""
    names = list(dict.fromkeys(name for t in record.trials for name in t["params"]))
    rows = [_row(t, names) for t in record.trials]
    heads = ("place", "trial", "state", "rung", "loss", "seeds' mean", *names)
    return section("Leaderboard", table(heads, rows, first=True, sort=True))


def _row(trial: Mapping[str, Any], names: list[str]) -> list[Any]:
    known = {int(k): v for k, v in trial["losses"].items() if v is not None}
    seeds = [v for v in trial.get("seeds", {}).values() if v is not None]
    mean = sum(seeds) / len(seeds) if seeds else None
    state = f"ended: {trial['ended']}" if trial.get("ended") else trial["state"]
    loss = known[max(known)] if known else None
    own = [trial["params"].get(name) for name in names]
    return [trial["place"], trial["trial"], state, trial["rung"], loss, mean, *own]
