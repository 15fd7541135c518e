"""The benchmarks run on a CPU, and the table of results says what each row is worth."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest

import gpt2
from benchmarks import harness, models, results

CASES = {
    "train_step --T 8 --warmup 1 --against peft": ["ours", "PEFT"],
    "train_step --T 8 --warmup 1 --axis r=1,2": ["ours", "ours"],
    "decode --new 12 --peft_new 8 --prompt 4 --against peft": ["ours", "ours merged", "PEFT"],
    "routing --B 2 --T 4 --adapters 2": ["ours, one adapter", "ours, 2 adapters mixed"],
    "population --slots 2 --T 8 --ticks 2": ["alone", "one adapter, 2 rows", "k=2", "2 alone"],
}


@pytest.mark.parametrize("command", CASES)
def test_a_benchmark_gives_a_line_a_case(command, tmp_path, monkeypatch):
    name, *options = command.split()
    if "peft" in options:
        pytest.importorskip("peft", reason="extra: peers")
    monkeypatch.setitem(models.SIZES, "gpt2", gpt2.GPT2Config(n_layer=2, n_head=2, n_embd=32))
    monkeypatch.setenv("COMMIT", "1234567")
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(
        sys, "argv", [name, "--device=cpu", "--repeats=2", f"--out={out}", *options]
    )
    importlib.import_module(f"benchmarks.{name}").main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["case"] for row in rows] == CASES[command]
    assert all(row["ms"]["p10"] <= row["ms"]["median"] <= row["ms"]["p90"] for row in rows)
    assert {row["commit"] for row in rows} == {"1234567"}


def test_a_row_is_old_once_its_files_change(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.delenv("COMMIT", raising=False)
    step, script = tmp_path / "gpt2" / "training" / "step.py", tmp_path / "scripts" / "train_qa.py"
    for file in (step, script):
        file.parent.mkdir(parents=True)
        file.write_text("1\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    commit, is_old = harness.commit(), results.is_old.__wrapped__
    script.write_text("2\n")
    assert harness.commit() == f"{commit}+"
    assert not is_old(commit, "train_step")  # scripts have no part in it
    assert is_old(f"{commit}+", "train_step")
    assert is_old("unknown", "train_step")
    step.write_text("2\n")
    assert is_old(commit, "train_step")


def test_every_result_names_machine_and_commit_and_every_source_exists():
    rows, machines = results.read(results.HERE / "results")
    assert {row["machine"] for row in rows} == {*machines.values()}
    assert all(row["commit"] and row["benchmark"] in results.SOURCES for row in rows)
    sources = {path for paths in results.SOURCES.values() for path in paths}
    assert not [path for path in sources if not (harness.ROOT / path).exists()]


def test_a_ratio_is_beside_pefts_row_of_the_same_work(monkeypatch):
    monkeypatch.setattr(results, "is_old", lambda commit, benchmark: commit == "old")
    row = {"benchmark": "train_step", "size": "gpt2", "machine": "h200", "date": "today"}
    ours = {"tokens_per_s": 300, "ms": {"median": 2.0, "p10": 1.5, "p90": 2.5}, "commit": "new"}
    rows = [
        {**row, "case": "ours", "B": 1, **ours},
        {**row, "case": "PEFT", "B": 1, "tokens_per_s": 200, "commit": "old"},
        {**row, "case": "PEFT", "B": 2, "tokens_per_s": 100, "commit": "new", "losses": [1.0]},
        {**row, "case": "PEFT", "B": 1, "tokens_per_s": 50, "commit": "new", "machine": "h100"},
    ]
    assert results.table(rows) == [
        "All: size gpt2.",
        "",
        "| case | B | tokens/s | ms | times as fast as | measured |",
        "|---|---|---|---|---|---|",
        "| ours | 1 | 300 | 2 (1.5–2.5) | 1.50 × PEFT | h200, new, today |",
        "| PEFT | 1 | 200 | — | — | h200, old, today: to be measured again |",
        "| PEFT | 2 | 100 | — | — | h200, new, today |",
        "| PEFT | 1 | 50 | — | — | h100, new, today |",
    ]


def test_the_zoo_is_exact_here_and_in_peft():
    pytest.importorskip("peft", reason="the extra peers")
    zoo = pytest.importorskip("benchmarks.zoo")
    cells = zoo.rows(["llama", "roberta"])  # a masked model has an lm_head too
    assert [row[:2] for row in cells[1::2]] == [
        ["llama", "`all-linear`"],
        ["roberta", "`all-linear`"],
    ]
    for _, _, birth, loss, *others, ejected in cells:
        assert birth == ejected == "0"
        assert loss.startswith("-")
        assert all(float(cell) < 1e-5 for cell in others)
