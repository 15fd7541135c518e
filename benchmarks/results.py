"""Make `RESULTS.md` and its plots from the JSON lines in `benchmarks/results/`, a file a machine.

python -m benchmarks.results [--replace NEW FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import harness

HERE = Path(__file__).parent
NETWORK = ("lora/layer.py", "lora/fast", "gpt2/model.py", "gpt2/fast")
TRAINING = (*NETWORK, "gpt2/loss.py", "gpt2/training")
POPULATION = ("lora/population.py", "gpt2/population", "gpt2/model.py", "gpt2/fast")
SOURCES: dict[str, Sequence[str]] = {  # what a figure depends on: once that changes it is old
    "train_step": TRAINING,
    "growth": TRAINING,
    "kernels": TRAINING,
    "decode": (*NETWORK, "lora/merging.py", "gpt2/generation.py", "gpt2/cache.py"),
    "routing": (*NETWORK, "lora/routing.py"),
    "population": POPULATION,
    "search": (*POPULATION, "scripts/tuner"),
    "article_run": ("lora", "gpt2"),
    "startup": ("lora", "gpt2"),
    "e2e": (*TRAINING, *POPULATION, "gpt2/beams.py", "scripts/configs/e2e.yaml"),
    "real_lengths": (*TRAINING, "gpt2/data"),
    "distributed": TRAINING,
    "kill_and_resume": ("gpt2/training",),
}
MACHINE = ("gpu", "cpu", "torch", "transformers", "peft", "python")
SAME_WORK = ("B", "T", "size", "targets", "r", "base_dropout", "prompt", "lengths", "machine")
RATES = ("steady_tokens_per_s", "tokens_per_s", "real_tokens_per_s")
HIDDEN = ("benchmark", "commit", "date", "machine", *MACHINE)
HEADINGS = {"_per_s": "/s", "_": " ", "gib": "GiB", "bleu": "BLEU"}
AXES = {"B": "rows (T=1024)", "T": "tokens a row (B=16)", "r": "rank", "size": "model (B=8)"}

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    what = "take new lines into a file of results, in place of those of the same benchmarks"
    parser.add_argument("--replace", nargs=2, metavar=("NEW", "FILE"), type=Path, help=what)
    if pair := parser.parse_args().replace:
        replace(*pair)
    rows, machines = read(HERE / "results")
    parts = ["# Results", "", (HERE / "NOTES.md").read_text().strip(), "", "## Machines", ""]
    parts += [f"- {name}: {about}" for about, name in machines.items()]
    for name in dict.fromkeys([*SOURCES, *(row["benchmark"] for row in rows)]):
        if chosen := [row for row in rows if row["benchmark"] == name]:
            parts += ["", f"## {name}", ""]
            if name == "growth":
                last = chosen[-1]["machine"]
                parts += [*plots([row for row in chosen if row["machine"] == last]), ""]
            parts += table(chosen)
    (HERE / "RESULTS.md").write_text("\n".join(parts) + "\n")


def replace(new: Path, file: Path) -> None:
    """Put new results in the place of the same benchmarks' earlier ones; keep all others."""
    lines = new.read_text().splitlines()
    made = {json.loads(line)["benchmark"] for line in lines}
    old = file.read_text().splitlines() if file.exists() else []
    kept = [line for line in old if json.loads(line)["benchmark"] not in made]
    whole = file.with_name(f"{file.name}.new")
    whole.write_text("\n".join([*kept, *lines]) + "\n")
    whole.replace(file)


def read(folder: Path) -> tuple[list[Row], dict[str, str]]:
    """All results, and the machines' names by what they are."""
    rows, machines = list[Row](), dict[str, str]()
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            about = " · ".join(f"{key} {row[key]}" for key in MACHINE if key in row)
            names = [name for name in machines.values() if name.partition("-")[0] == file.stem]
            usual = f"{file.stem}-{len(names) + 1}" if names else file.stem
            rows.append(row | {"machine": machines.setdefault(about, usual)})
    return rows, machines


# --- tables ---------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> list[str]:
    """A column for each key of the rows, and where, when and at which commit each was measured."""
    every = dict.fromkeys(key for row in rows for key in row if key not in HIDDEN)
    keys = [key for key in every if not any(isinstance(row.get(key), list) for row in rows)]
    alike = [key for key in keys if key != "case" and len({cell(row, key) for row in rows}) == 1]
    keys = ["case", *(key for key in keys if key not in ("case", *alike))]
    columns = {heading(key): [cell(row, key) for row in rows] for key in keys}
    if any(ratios := [faster(row, rows) for row in rows]):
        columns["times as fast as"] = [ratio or "—" for ratio in ratios]
    columns["measured"] = [measured(row) for row in rows]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(cells)} |" for cells in zip(*columns.values(), strict=True)]
    same = ", ".join(f"{heading(key)} {cell(rows[0], key)}" for key in alike)
    return [f"All: {same}.", "", *lines] if same else lines


def heading(key: str) -> str:
    """A key in words."""
    for part, words in HEADINGS.items():
        key = key.replace(part, words)
    return key


def cell(row: Row, key: str) -> str:
    """A value in few digits; times as their median, with the 10th and 90th percentile."""
    value = row.get(key)
    if value is None or value == "":
        return "—"
    if isinstance(value, Mapping):
        parts = {name: number(part) for name, part in value.items()}
        if "median" in parts:
            return f"{parts['median']} ({parts['p10']}–{parts['p90']})"
        return ", ".join(f"{name} {part}" for name, part in parts.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("_bleu"):
        return f"{value:.1f}"  # more digits than its noise has
    return value if isinstance(value, str) else number(value)


def number(value: float) -> str:
    """Four digits, or all of those before the point."""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def faster(row: Row, rows: Sequence[Row]) -> str:
    """How many times PEFT's rates at the same work; checkpointing is compared with the same."""
    rate = next((key for key in RATES if row.get(key)), "")
    if not rate or row["case"].startswith("PEFT"):
        return ""
    ratios = [
        f"{row[rate] / peer[rate]:.2f} × {peer['case']}"
        for peer in rows
        if peer["case"].startswith("PEFT")
        and peer.get(rate)
        and all(peer.get(key) == row.get(key) for key in SAME_WORK)
        and ("checkpointing" in peer["case"]) == ("checkpointing" in row["case"])
    ]
    return ", ".join(ratios)


def measured(row: Row) -> str:
    """The machine, the commit and the day, and whether the figure still is this code's."""
    where = f"{row['machine']}, {row['commit']}, {row['date']}"
    old = is_old(row["commit"], row["benchmark"])
    return f"{where}: to be measured again" if old else where


@cache
def is_old(commit: str, benchmark: str) -> bool:
    """Whether what the benchmark runs has changed since that commit, or git does not know it."""
    sources = SOURCES.get(benchmark, ())
    return harness.git("diff", "--quiet", commit, "--", *sources).returncode != 0


# --- plots ----------------------------------------------------------------------------------------


def plots(rows: Sequence[Row]) -> list[str]:
    """Speed and memory on a GPU over batch, length, rank and model size."""
    links: list[str] = []
    for key, label in (("tokens_per_s", "tokens/s"), ("peak_gib", "peak memory, GiB")):
        figure = Figure(figsize=(11, 2.8), layout="constrained")
        for axes, (axis, title) in zip(figure.subplots(1, len(AXES)), AXES.items(), strict=True):
            points = [row for row in rows if row["axis"] == axis]
            names = [str(row[axis]).removeprefix("gpt2-") for row in points]
            axes.plot(names, [row[key] for row in points], "o-")
            if key == "tokens_per_s":  # from the 10th to the 90th percentile of the time
                band = [
                    [row[key] * row["ms"]["median"] / row["ms"][end] for row in points]
                    for end in ("p90", "p10")
                ]
                axes.fill_between(names, *band, alpha=0.25)
            axes.set(xlabel=title, ylabel=label)
            axes.set_ylim(0, 1.1 * axes.dataLim.y1)
        path = harness.ROOT / "docs" / f"growth-{key}.png"
        figure.savefig(path, dpi=110)
        links.append(f"![{label}](../docs/{path.name})")
    return links


if __name__ == "__main__":
    main()
