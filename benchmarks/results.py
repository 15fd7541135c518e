"""Make `RESULTS.md` from the JSON lines in `benchmarks/results/`.

python -m benchmarks.results
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MATMUL = 790e12  # FLOP/s of a large bf16 product measured on an H200
NEEDED = 4 * 124e6  # FLOP a token of a LoRA step on GPT-2 124M: forward, and gradients of inputs


def main() -> None:
    parts = ["# Results", "", (HERE / "NOTES.md").read_text().strip()]
    for file in sorted((HERE / "results").glob("*.jsonl")):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        parts += ["", f"## {file.stem}", "", _machine(records[-1])]
        for name in dict.fromkeys(record["benchmark"] for record in records):
            rows = [record for record in records if record["benchmark"] == name]
            parts += ["", f"### {name}", "", *_table(rows)]
    (HERE / "RESULTS.md").write_text("\n".join(parts) + "\n")


def _machine(record: dict[str, Any]) -> str:
    keys = ("gpu", "cpu", "torch", "transformers", "peft", "python", "date")
    return " · ".join(f"{key} {record[key]}" for key in keys if key in record)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """One line a case; the ratio is PEFT's time over ours at the same work, best against best."""
    lines = [
        "| work | case | median (p10–p90) | tokens/s | of the limit | peak GiB | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        unit, time = ("ms", row["ms"]) if "ms" in row else ("s", row["seconds"])
        took = f"{time['median']:.4g} ({time['p10']:.4g}–{time['p90']:.4g}) {unit}" if time else "—"
        speed = row.get("tokens_per_s")
        step_on_gpu = row["benchmark"] == "train_step" and "gpu" in row
        limit = f"{speed * NEEDED / MATMUL:.2f}" if speed and step_on_gpu else "—"
        peak = row.get("peak_gib")
        note = row.get("failed") or _note(row, rows)
        cells = [_work(row), row["case"], took, f"{speed:,}" if speed else "—", limit]
        lines.append(
            f"| {' | '.join([*cells, f'{peak:.2f}' if peak and peak > 0 else '—', note])} |"
        )
    return lines


def _work(row: dict[str, Any]) -> str:
    words = [f"{key}={row[key]}" for key in ("B", "T", "new", "targets") if key in row]
    if row.get("base_dropout") is False:
        words.append("base dropouts off")
    return " ".join(words) or "—"


def _note(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    if "against_one" in row:
        return f"{row['against_one']:.2f} × one adapter"
    if row["case"].startswith("PEFT") or "tokens_per_s" not in row:
        return ""
    peers = [r for r in rows if r["case"].startswith("PEFT") and _same(r, row)]
    speeds = [r["tokens_per_s"] for r in peers if r.get("tokens_per_s")]
    if not speeds or not row["tokens_per_s"]:
        return ""
    ratios = sorted(row["tokens_per_s"] / speed for speed in speeds)
    return f"{' and '.join(f'{r:.2f}' for r in ratios)} × PEFT"


def _same(peer: dict[str, Any], row: dict[str, Any]) -> bool:
    keys = ("B", "T", "size", "targets", "r", "base_dropout", "prompt")
    return all(peer.get(key) == row.get(key) for key in keys)


if __name__ == "__main__":
    main()
