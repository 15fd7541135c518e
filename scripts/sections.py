"""What the page of a run shows, section by section; each is empty where nothing is known."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from charts import Line, Point, line_chart, thinned
from page import changed, pairs, section, table, text, tiles
from record import Record

COLUMNS = 200  # of points: the lowest and the highest of each are drawn
STYLES = 6
# FLOP a second that a large bfloat16 product reaches; 4 FLOP a parameter and token are needed:
# forward, and the gradients of inputs.
PEAKS = {"H100": 790e12, "H200": 790e12}
Charts = dict[str, list[Mapping[str, Any]]]


def head(record: Record) -> str:
    """The title, whether the run ended, and the largest figures."""
    base, lora = record.config.get("model_name", "?"), record.config.get("lora") or {}
    device = record.run.get("machine") or record.run.get("device") or "device not recorded"
    lead = f"{base}, adapted by LoRA of rank {lora.get('r', '?')}, on {device}."
    stopped = (
        ""
        if record.ended
        else '<p class="warn">This run did not come to its end: there is no run.json. What follows '
        f"is what it had written, up to step {len(record.metrics):,}.</p>"
    )
    figures: list[tuple[str, str]] = []
    if record.metrics:
        last = record.metrics[-1]
        figures.append(("steps", f"{last['step']:,}"))
        figures.append(("loss of the last step", f"{last['loss']:.4f}"))
        figures += [("seconds of training", f"{last['seconds']:,.1f}")]
    if record.best:
        figures.insert(1, (f"best held-out loss, step {record.best[0]:,}", f"{record.best[1]:.4f}"))
    if count := record.run.get("parameters", {}).get("LoRA"):
        share = 100 * count["trainable"] / count["total"]
        figures.append((f"trained parameters, {share:.2f} %", f"{count['trainable']:,}"))
    return (
        f'<header><h1>{text(record.name)}</h1><p class="lead">{text(lead)}</p>{stopped}</header>'
        + (tiles(figures) if figures else "")
    )


def curves(record: Record, charts: Charts, key: str = "") -> str:
    """Loss and held-out loss, learning rate, gradient norm."""
    if not record.metrics:
        return ""
    loss = record.line("loss")
    lines = [Line(name="loss", points=thinned(loss, COLUMNS), style="pale")]
    if len(loss) >= 20:
        every = max(2, len(loss) // 50)
        lines.append(Line(name=f"mean of {every} steps", points=_means(loss, every), style="c0"))
    if record.held_out:
        lines.append(Line(name="held-out loss", points=record.held_out, style="c1"))
    small = [
        ("learning rate", [Line(name="learning rate", points=thinned(record.line("lr"), 60))]),
        ("gradient norm", [Line(name="gradient norm",
                                points=thinned(record.line("grad_norm"), 100))]),
    ]  # fmt: skip
    drawn = chart(f"{key}loss", lines, charts, mark=record.best)
    both = "".join(chart(f"{key}{n}", own, charts, size=(480, 200)) for n, own in small)
    odd = [step for step, value in loss if not math.isfinite(value)]
    note = "Loss in nats a token. Each column shows its lowest and its highest point."
    if record.best:
        note += f" The dashed line marks the best step, {record.best[0]:,}."
    if odd:
        note += f" {len(odd):,} steps have no finite loss, the first is {odd[0]:,}."
    return section("Training", drawn, f'<div class="pair">{both}</div>', note=note)


def _means(points: Sequence[Point], every: int) -> list[Point]:
    found = [points[i : i + every] for i in range(0, len(points) - every + 1, every)]
    return [(own[len(own) // 2][0], sum(p[1] for p in own) / every) for own in found]


def chart(name: str, lines: list[Line], charts: Charts, **how: Any) -> str:
    """A chart with its key; its points go to the page's script too."""
    charts[name] = [{"name": line.name, "points": [list(p) for p in line.points]} for line in lines]
    keys = "".join(
        f'<span class="key"><i class="{line.style}"></i>{text(line.name)}</span>' for line in lines
    )
    return f"<figure>{line_chart(name, lines, **how)}<figcaption>{keys}</figcaption></figure>"


def answers(record: Record) -> str:
    """Each prompt with what base and tuned model say, and what was wanted."""
    parts: list[str] = []
    for a in record.run.get("answers", []):
        wanted = [*a.get("trained", ()), *a.get("references", ())]
        best = next((w for w in wanted if w == a["tuned"]), wanted[0] if wanted else None)
        told = [
            ("base", changed(a["tuned"], a["base"], "del")),
            ("tuned", changed(a["base"] if best is None else best, a["tuned"], "ins")),
        ]
        if best is not None:
            told.append(("reference", changed(a["tuned"], best, "ins")))
        ok = " ok" if "exact" in a["verdict"] else ""
        badge = f'<span class="badge{ok}">{text(a["verdict"])}</span>'
        parts.append(_answer(a["prompt"], told, badge))
    for a in record.run.get("routed", []):
        base, *others = a["answers"].items()
        told = [(base[0], text(base[1]))]
        told += [(name, changed(base[1], said, "ins")) for name, said in others]
        parts.append(_answer(a["prompt"], told, ""))
    note = "Where two texts are alike, the words that differ are marked."
    return section("Answers", *parts, note=f"{record.run.get('score', '')} {note}".strip())


def _answer(prompt: str, told: Sequence[tuple[str, str]], badge: str) -> str:
    cells = "".join(
        f'<div><small>{text(name)}</small><div class="say">{said.strip()}</div></div>'
        for name, said in told
    )
    asked = f'<div class="q">{text(prompt)} {badge}</div>'
    return f'<div class="answer">{asked}<div class="cols">{cells}</div></div>'


def tokens(record: Record) -> str:
    """Passages whose tokens are coloured by what the adapter changed."""
    parts: list[str] = []
    seen = record.run.get("observed", {})
    for passage in seen.get("passages", []):
        spans, rows = list[str](), list[list[Any]]()
        for token, base, tuned in passage["tokens"]:
            if base is None or tuned is None:
                spans.append(f'<span class="p">{text(token)}</span>')
                continue
            gain = tuned - base
            kind, depth = "gain" if gain >= 0 else "loss", min(abs(gain) / 8, 1) ** 0.6 * 0.6
            title = f"{gain:+.3f} nats: {base:.3f} before, {tuned:.3f} after"
            spans.append(
                f'<span style="background:rgba(var(--{kind}),{depth:.2f})" title="{title}">'
                f"{text(token)}</span>"
            )
            rows.append([repr(token), base, tuned, gain])
        own = table(("token", "base", "tuned", "gained"), rows)
        parts.append(f'<div class="tokens">{"".join(spans)}</div>')
        parts.append(f"<details><summary>the numbers</summary>{own}</details>")
    note = f"{seen.get('from', 'A passage')}: blue tokens became more likely, orange ones less; "
    return section("What the adapter changed", *parts, note=note + "log-probabilities, in nats.")


def updates(record: Record) -> str:
    """The size of each layer's update against its weight's."""
    rows = record.run.get("observed", {}).get("updates", [])
    most = max((row["update"] / row["weight"] for row in rows if row["weight"]), default=0) or 1
    lines: list[str] = []
    for row in rows:
        share = row["update"] / row["weight"] if row["weight"] else 0.0
        bar = f'<div class="bar thin"><i style="width:{100 * share / most:.1f}%"></i></div>'
        exact = f'title="{row["update"]!r} of {row["weight"]!r}"'
        cells = f'<td>{text(row["layer"])}</td><td class="wide">{bar}</td>'
        lines.append(f'<tr>{cells}<td class="n" {exact}>{100 * share:.2f} %</td></tr>')
    body = f'<div class="scroll"><table>{"".join(lines)}</table></div>' if lines else ""
    note = "Frobenius norm of s·BA over that of the weight that it is added to."
    return section("Where the update is", body, note=note)


def speed(record: Record) -> str:
    """Tokens a second, against the device's limit where it is known."""
    if not record.metrics or not record.metrics[-1].get("seconds"):
        return ""
    rate = sum(row["tokens"] for row in record.metrics) / record.metrics[-1]["seconds"]
    device = str(record.run.get("machine") or record.run.get("device") or "")
    peak = next((flops for name, flops in PEAKS.items() if name in device), None)
    total = record.run.get("parameters", {}).get("LoRA", {}).get("total")
    said = f"{rate:,.0f} supervised tokens a second"
    if not (peak and total):
        return section("Speed", f"<p>{said}. The limit of this device is not known.</p>")
    limit = peak / (4 * total)
    bar = f'<div class="bar"><i style="width:{min(100, 100 * rate / limit):.2f}%"></i></div>'
    note = f"The limit takes {peak / 1e12:g} TFLOP/s and 4 FLOP a parameter and token."
    return section("Speed", f"<p>{said}: {rate / limit:.1%} of {limit:,.0f}.</p>", bar, note=note)


def asked(record: Record) -> str:
    """Options, data, machine and versions."""
    run = record.run
    flat = {k: v for k, v in record.config.items() if not isinstance(v, Mapping) and v is not None}
    for group in ("lora", "generate"):
        flat |= {f"{group}.{k}": v for k, v in (record.config.get(group) or {}).items()
                 if v not in (None, [], False)}  # fmt: skip
    machine = {k: run.get(k) for k in ("device", "machine")} | run.get("versions", {})
    data = {k: f"{v:,}" if isinstance(v, int) else v for k, v in run.get("data", {}).items()}
    seconds = {k: f"{v:,.1f} s" for k, v in run.get("seconds", {}).items()}
    parts = ""
    for title, rows in (("data", data), ("machine", machine), ("time", seconds), ("options", flat)):
        known = {k: v for k, v in rows.items() if v is not None}
        parts += f"<h3>{title}</h3>{pairs(known)}" if known else ""
    return section("What was asked, and where it ran", parts)


def commands(record: Record) -> str:
    """What makes the run again, and what uses its adapter."""
    script = "search.py" if record.trials else "train_qa.py"
    again = ["python", f"scripts/{script}", "--config", f"{record.place}/options.yaml"]
    lines = [("The same run again, in a new folder", shlex.join(again))]
    adapters = [p.place for p in record.parts] or [record.place]
    base = str(record.config.get("model_name", "demo"))
    if record.trials:
        adapters = [f"{record.place}/best"]
        train = ["python", "scripts/train_qa.py", "--config", f"{record.place}/best/train.yaml"]
        lines.append(("The winner trained again", shlex.join(train)))
    prompt = next((a["prompt"] for a in record.run.get("answers", [])), "Once upon a time")
    for place in adapters:
        use = ["python", "scripts/generate.py", prompt, "--base", base, "--adapter", place]
        lines.append(("Use the adapter", shlex.join(use)))
        merge = ["python", "scripts/merge.py", place, f"{place}-merged", "--base", base]
        lines.append(("Fold it into the base", shlex.join(merge)))
    return section("Commands", *(f"<h3>{text(t)}</h3><pre>{text(line)}</pre>" for t, line in lines))
