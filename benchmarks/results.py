"""Make `RESULTS.md` and its plots from the JSON lines in `benchmarks/results/`.

python -m benchmarks.results [--replace NEW FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

HERE = Path(__file__).parent
MATMUL = 790e12  # FLOP/s of a large bf16 product measured on an H200
PARAMETERS = {"gpt2": 124e6, "gpt2-medium": 355e6, "gpt2-large": 774e6, "gpt2-xl": 1558e6}
AXES = {"B": "rows (T=1024)", "T": "tokens a row (B=16)", "r": "rank", "size": "model (B=8)"}

Row = dict[str, Any]
Cell = Callable[[Row, Sequence[Row]], str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    what = "take new lines into a file of results, in place of those of the same benchmarks"
    parser.add_argument("--replace", nargs=2, metavar=("NEW", "FILE"), type=Path, help=what)
    if pair := parser.parse_args().replace:
        replace(*pair)
    parts = ["# Results", "", (HERE / "NOTES.md").read_text().strip()]
    for file in sorted((HERE / "results").glob("*.jsonl")):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        parts += ["", f"## {file.stem}", "", _machine(records[-1])]
        for name in dict.fromkeys(record["benchmark"] for record in records):
            rows = [record for record in records if record["benchmark"] == name]
            if name == "growth" and "gpu" in rows[0]:
                parts += ["", *_plots(rows)]
            parts += ["", f"### {name}", "", *_table(rows, COLUMNS.get(name, TIMED))]
    (HERE / "RESULTS.md").write_text("\n".join(parts) + "\n")


def replace(new: Path, file: Path) -> None:
    """Put new results in the place of the same benchmarks' earlier ones; keep all others."""
    lines = new.read_text().splitlines()
    made = {json.loads(line)["benchmark"] for line in lines}
    old = file.read_text().splitlines() if file.exists() else []
    kept = [line for line in old if json.loads(line)["benchmark"] not in made]
    beside = file.with_name(f"{file.name}.new")
    beside.write_text("\n".join([*kept, *lines]) + "\n")
    beside.replace(file)


def _machine(record: Row) -> str:
    keys = ("gpu", "cpu", "torch", "transformers", "peft", "python", "date")
    return " · ".join(f"{key} {record[key]}" for key in keys if key in record)


# --- tables: a heading and a cell for each column -------------------------------------------------


def _table(
    rows: Sequence[Row], columns: dict[str, Callable[[Row, Sequence[Row]], str]]
) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        lines.append(f"| {' | '.join(cell(row, rows) or '—' for cell in columns.values())} |")
    return lines


def _work(row: Row, _: Sequence[Row]) -> str:
    words = [row["size"]] if row.get("size", "gpt2") != "gpt2" else []
    words += [f"{key}={row[key]}" for key in ("B", "T", "new", "targets", "r") if key in row]
    if row.get("packed"):
        words += [f"packed {row['packed']}, documents to {row['context']}"]
    if row.get("base_dropout") is False:
        words.append("base dropouts off")
    return " ".join(words)


def _took(row: Row, _: Sequence[Row]) -> str:
    unit, time = ("ms", row["ms"]) if "ms" in row else ("s", row.get("seconds"))
    if not time:
        return ""
    return f"{time['median']:.4g} ({time['p10']:.4g}–{time['p90']:.4g}) {unit}"


def _limit(row: Row, _: Sequence[Row]) -> str:
    """Of 790 TFLOP/s, at 4 FLOP a parameter and token: forward, and the gradients of inputs."""
    if "gpu" not in row or not row.get("tokens_per_s"):
        return ""
    return f"{row['tokens_per_s'] * 4 * PARAMETERS[row['size']] / MATMUL:.2f}"


def _note(row: Row, rows: Sequence[Row]) -> str:
    if "failed" in row:
        return row["failed"]
    if "against_one" in row:
        return f"{row['against_one']:.2f} × one adapter"
    notes = ["earlier commit"] if row.get("earlier") else []
    if row["case"].endswith("compiled") and row.get("targets") == "all":
        one = [r for r in rows if r["case"] == "ours compiled, c_attn" and _same(r, row)]
        notes += [f"{_median(row) / _median(r):.2f} × c_attn's time" for r in one]
        notes += [f"{row['peak_gib'] / r['peak_gib']:.2f} × its memory" for r in one]
    if not row["case"].startswith("PEFT"):
        notes += _ratios(row, rows, "tokens_per_s")
    return ", ".join(notes)


def _ratios(row: Row, rows: Sequence[Row], key: str) -> list[str]:
    checkpointing = "checkpointing" in row["case"]
    peers = [r for r in rows if r["case"].startswith("PEFT") and _same(r, row)]
    return [
        f"{row[key] / r[key]:.2f} × {r['case']}"
        for r in peers
        if r.get(key) and row.get(key) and checkpointing == ("checkpointing" in r["case"])
    ]


def _of_fixed(row: Row, rows: Sequence[Row]) -> str:
    """The share of the rate that one shape without padding reaches."""
    full = [r for r in rows if "all real" in r["case"] and r["lengths"] == row["lengths"]]
    if not full or "all real" in row["case"] or not row.get("real_tokens_per_s"):
        return ""
    return f"{row['real_tokens_per_s'] / full[-1]['real_tokens_per_s']:.2f}"


def _median(row: Row) -> float:
    return row["ms"]["median"]


def _same(peer: Row, row: Row) -> bool:
    keys = ("B", "T", "size", "targets", "r", "base_dropout", "prompt")
    return all(peer.get(key) == row.get(key) for key in keys)


def _number(key: str, form: str = ",") -> Cell:
    return lambda row, _: f"{row[key]:{form}}" if row.get(key) else ""


def _case(row: Row, _: Sequence[Row]) -> str:
    return row["case"]


def _gpus(row: Row) -> str:
    return row["way"] if "way" in row else f"{row['gpus']} GPUs {row.get('how', '')}".strip()


TIMED = {
    "work": _work,
    "case": _case,
    "median (p10–p90)": _took,
    "tokens/s": _number("tokens_per_s"),
    "of the limit": _limit,
    "peak GiB": _number("peak_gib", ".2f"),
    "loss": _number("loss"),
    "note": _note,
}
COLUMNS: dict[str, dict[str, Cell]] = {
    "real_lengths": {
        "work": lambda row, _: row["lengths"],
        "case": _case,
        "real tokens/s": _number("real_tokens_per_s"),
        "of 16 x 1,024's": _of_fixed,
        "first epoch, compile included, s": _number("first_epoch_s"),
        "loader's share": _number("loader_share", ".1%"),
    },
    "population": {
        "work": _work,
        "case": _case,
        "a step, host included": _took,
        "on the GPU, ms": _number("gpu_ms", ".2f"),
        "kernels": _number("kernels"),
        "peak GiB": _number("peak_gib", ".2f"),
    },
    "distributed": {
        "work": _work,
        "case": lambda row, _: f"{row['case']}, {_gpus(row)}",
        "a step": _took,
        "tokens/s a GPU": _number("tokens_per_s_a_gpu"),
        "times one": _number("times", ".3f"),
        "state a GPU, of one's": _number("state_over_one", ".2f"),
        "apart, relative": lambda row, _: f"{row['apart']:.1e}" if "apart" in row else "",
    },
    "restart": {
        "case": lambda row, _: f"{row['case']}, process {row['killed']} of {row['gpus']}",
        "s": _number("seconds", ".1f"),
        "same bytes": lambda row, _: "yes" if row["same_bytes"] else "no",
    },
    "search": {
        "case": lambda row, _: row["case"] + (f", seed {row['seed']}" if "seed" in row else ""),
        "s": _number("seconds", ".1f"),
        "adapter-steps": _number("adapter_steps"),
        "trials/s": _number("trials_per_s", ".2f"),
        "of all steps": _number("share_of_all_steps", ".1%"),
        "best held-out loss": _number("best"),
        "found": _number("found"),
        "within 1 %": lambda row, _: (
            ("no", "yes")[row["within_1_percent"]] if "within_1_percent" in row else ""
        ),
        "random, at equal cost": _number("random_at_equal_cost", ".0%"),
    },
    "kill_and_resume": {
        "case": lambda row, _: f"{row['case']}, {'CUDA graphs' if row['graphs'] else 'eager'}",
        "same bits": lambda row, _: "yes" if row["equal"] else "no",
    },
    "routing": {"work": _work, "case": _case, "median (p10–p90)": _took, "note": _note},
    "startup": {"case": _case, "median (p10–p90)": _took},
    "article_run": {
        "case": _case,
        "median (p10–p90)": _took,
        "seconds of": lambda row, _: ", ".join(
            f"{part} {seconds:.2f}" for part, seconds in row.get("parts", {}).items()
        ),
    },
    "snapshot": {
        "work": _work,
        "case": _case,
        "file, MB": _number("megabytes", ".1f"),
        "a save": _took,
        "of a second": _number("share", ".2%"),
    },
    "repeat": {
        "case": _case,
        "two runs": lambda row, _: "equal" if row["equal"] else "differ",
        "where they part": _number("where", ""),
    },
    "decode": {
        "work": _work,
        "case": _case,
        "whole call": _took,
        "its tokens/s": _number("tokens_per_s"),
        "tokens/s once it runs": _number("steady_tokens_per_s"),
        "same tokens": _number("same_tokens_as_ours", ".0%"),
        "note": lambda row, rows: (
            "" if row["case"] == "PEFT" else ", ".join(_ratios(row, rows, "steady_tokens_per_s"))
        ),
    },
    "memory": {"work": _work, "case": _case, "kept for backward, MiB": _number("kept_mib")},
    "kernels": {
        "work": _work,
        "case": _case,
        "ms": _number("kernel_ms", ".2f"),
        "kernels": _number("kernels"),
    },
    "e2e": {
        "case": _case,
        "trained weights": _number("trainable"),
        "held-out loss": _number("valid_loss", ".3f"),
        "BLEU, greedy": _number("greedy_bleu", ".1f"),
        "BLEU, beams": _number("beams_bleu", ".1f"),
        "steps": _number("steps"),
        "training, s": _number("training_seconds", ".0f"),
        "steps/s": _number("steps_per_s", ".0f"),
        "greedy, s": _number("greedy_seconds", ".1f"),
        "beams, s": _number("beams_seconds", ".1f"),
        "timed": lambda row, _: row.get("timed", "alone"),
    },
    "curve": {
        "base": _case,
        "mean loss of each tenth of the run": lambda row, _: " · ".join(map(str, row["curve"])),
        "last 100 steps": _number("end"),
        "after it, without dropout": _number("end_without_dropout"),
    },
}


# --- plots ----------------------------------------------------------------------------------------


def _plots(rows: Sequence[Row]) -> list[str]:
    """Speed and memory over batch, length, rank and model size."""
    links: list[str] = []
    for key, label in (("tokens_per_s", "tokens/s"), ("peak_gib", "peak memory, GiB")):
        figure = Figure(figsize=(11, 2.8), layout="constrained")
        for axes, (axis, title) in zip(figure.subplots(1, len(AXES)), AXES.items(), strict=True):
            points = [row for row in rows if row["axis"] == axis]
            names = [str(row[axis]).removeprefix("gpt2-") for row in points]
            axes.plot(names, [row[key] for row in points], "o-")
            if key == "tokens_per_s":  # from the 10th to the 90th percentile of the time
                spread = [
                    [row[key] * row["ms"]["median"] / row["ms"][end] for row in points]
                    for end in ("p90", "p10")
                ]
                axes.fill_between(names, *spread, alpha=0.25)
            axes.set(xlabel=title, ylabel=label)
            axes.set_ylim(0, 1.1 * axes.dataLim.y1)
        path = HERE.parent / "docs" / f"growth-{key}.png"
        figure.savefig(path, dpi=110)
        links.append(f"![{label}](../docs/{path.name})")
    return links


if __name__ == "__main__":
    main()
