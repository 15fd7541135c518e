"""README.md: its Python runs as it stands, and every test that it names is there."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import lora
from lora.config import PEFT_NAMES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RATE = "steady_tokens_per_s"
TEXT = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_run(page, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    if any("transformers" in block for block in blocks):
        pytest.importorskip("transformers", reason="the extra peers")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        try:
            exec(compile(block, page.name, "exec"), names)
        except ModuleNotFoundError as error:
            if error.name not in ("timm", "sentence_transformers"):  # heavy, in no extra
                raise
    if page.name == "README.md":
        assert len(blocks) == 4
        assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_tests_and_files_that_are_named_exist():
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)(?:\.py)?`", page.read_text()):
            assert f"def {name}(" in tests or (ROOT / "tests" / f"{name}.py").is_file(), name
    for name in re.findall(r"`([\w/]+\.py)`", TEXT):
        assert (ROOT / name).is_file(), name
    design = (ROOT / "docs" / "design.md").read_text()
    rooms = re.search(r"^## Rooms\n.*?```\n(.*?)```", design, re.MULTILINE | re.DOTALL)[1]
    packages = ("lora", "gpt2", "scripts", "tests", "benchmarks")
    files = {part: {path.stem for path in (ROOT / part).rglob("*.py")} for part in packages}
    ours = set.union(*(files[part] for part in packages[:3])) - {"__init__"}
    assert not ours - set(re.findall(r"\w+", rooms))
    assert not set(re.findall(r"\b(\w+)\.py\b", rooms)) - set.union(*files.values())


# Each row of README's table of speeds: the fields that name its rows in the results; then, for each
# of its cells, the case and the figures that it shows.
STEP = {"benchmark": "train_step", "targets": "c_attn", "size": "gpt2", "base_dropout": True}
XL = {"benchmark": "train_step", "size": "gpt2-xl"}
DECODE = {"benchmark": "decode"}
ROUTING = {"benchmark": "routing"}
BOTH = ("ms", "peak_gib")
OURS, BEST = ("ours compiled", *BOTH), ("PEFT compiled, default", *BOTH)
KEPT = "compiled, checkpointing", "bf16, checkpointing"
MIXED = "16 adapters mixed"
SPEEDS = [
    (STEP | {"B": 16}, OURS, ("PEFT", *BOTH), BEST),
    (STEP | {"B": 16, "targets": "all"}, OURS, None, BEST),
    (STEP | {"B": 1}, OURS[:2], ("PEFT", "ms"), ("PEFT compiled, reduce-overhead", "ms")),
    (XL, OURS, ("PEFT bf16", *BOTH), None),
    (XL, (f"ours {KEPT[0]}", *BOTH), (f"PEFT {KEPT[1]}", *BOTH), None),
    (DECODE | {"B": 1}, ("ours merged", RATE), ("PEFT", RATE), None),
    (DECODE | {"B": 32}, ("ours merged", RATE), ("PEFT", RATE), None),
    (ROUTING, (f"ours, {MIXED}", "against_one"), (f"PEFT, {MIXED}", "against_one"), None),
]


def results(machine: str) -> list[dict[str, Any]]:
    lines = (ROOT / "benchmarks" / "results" / f"{machine}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def shown(fields: dict[str, Any], case: str, keys: Sequence[str]) -> list[float]:
    """The figures of the one row of the results that has these fields and this case."""
    wanted = fields | {"case": case}
    (row,) = [r for r in results("h200") if {k: r.get(k) for k in wanted} == wanted]
    return [row["ms"]["median"] if key == "ms" else row[key] for key in keys]


def figures(text: str) -> list[str]:
    return [n.replace(",", "") for n in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]


def rounded(value: float, figure: str) -> float:
    return round(value, len(figure.partition(".")[2]))


def test_each_speed_is_that_of_its_row_in_the_results():
    table = re.findall(r"^\|[^|]+\|(.+)\|$", TEXT[TEXT.index("## Speed") :], re.MULTILINE)[2:]
    for line, (fields, *cells) in zip(table, SPEEDS, strict=True):
        for cell, wanted in zip(line.split("|"), cells, strict=True):
            expected = shown(fields, wanted[0], wanted[1:]) if wanted else []
            if RATE in (wanted or ()) and fields["benchmark"] == "decode" and "not" in cell:
                expected += shown(fields, "ours", (RATE,))
            printed = figures(cell)
            assert [float(n) for n in printed] == [
                rounded(value, n) for value, n in zip(expected, printed, strict=True)
            ], line


def test_the_reasons_are_those_of_the_results():
    ours, theirs = (shown(STEP | {"B": 16}, case, keys) for case, *keys in (OURS, BEST))
    wanted = [theirs[0] / ours[0], *ours, *theirs]
    for case in ("ours", "PEFT"):
        wanted += shown(ROUTING, f"{case}, {MIXED}", ["against_one"])
    head = TEXT[TEXT.index("- **") : TEXT.index("- **Exact**")]
    printed = [n for n in figures(head) if "." in n]
    assert [float(n) for n in printed] == [
        rounded(value, n) for value, n in zip(wanted, printed, strict=True)
    ]


def test_the_scores_in_the_advice_are_those_of_the_results():
    advice = (ROOT / "docs" / "best-adapter.md").read_text()
    notes = set(figures((ROOT / "benchmarks" / "RESULTS.md").read_text()))
    scores = re.findall(r"\b\d\d\.\d\b", advice)
    assert len(scores) > 10
    assert set(scores) <= notes


def test_two_screens_come_before_the_first_link_into_docs():
    assert len(TEXT.splitlines()) <= 280
    assert "make qa" in "".join(TEXT.splitlines()[:25])
    assert "](docs/" not in "".join(TEXT.splitlines()[28:90])


def test_every_link_leads_somewhere():
    headings = re.findall(r"^## (.+)$", TEXT, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings}
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            here = target in anchors if target[0] == "#" else (page.parent / target).exists()
            assert here or target.startswith("https://"), target


def test_the_errors_are_those_of_the_code():
    """Each piece of a quoted message between its dots is a piece of a string in the code."""
    section = TEXT[TEXT.index("## When something goes wrong") :]
    quoted = re.findall(r"^\| `(.+?)` \|", section[: section.index("\n## ")], re.MULTILINE)
    files = [f for part in ("lora", "gpt2", "scripts") for f in (ROOT / part).rglob("*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    said = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    assert len(quoted) == 10
    for piece in (piece for message in quoted for piece in message.split("…")):
        assert any(piece.strip() in text for text in said), piece


def test_pefts_names_are_told_as_the_table_tells_them():
    section = TEXT[TEXT.index("## Coming from PEFT") :]
    table = section[: section.index("\n\n`lora.inject` answers")]
    for theirs, ours in PEFT_NAMES.items():
        if theirs != "rank":  # a name that people try, and not PEFT's
            row = next(line for line in table.splitlines() if f"`{theirs}" in line)
            assert f"`{ours}" in row.split("|")[2]
    for name in re.findall(r"lora\.(\w+)", table):
        assert hasattr(lora, name), name


@pytest.mark.skipif(os.name != "posix", reason="a shell's commands")
def test_the_commands_for_ones_own_data_run(tmp_path):
    section = TEXT[TEXT.index("## Your own data") :]
    block = re.search(r"```\n(.*?)```", section, re.DOTALL)[1]
    commands = block.replace(".venv/bin/python scripts", f"{sys.executable} {ROOT / 'scripts'}")
    done = subprocess.run(
        ["bash", "-ec", commands], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("Q: Where is Oslo?\nA: Oslo is in Norway.\n")
    assert (tmp_path / "runs" / "mine" / "adapter" / "adapter_config.json").is_file()
