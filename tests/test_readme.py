"""README.md: its Python runs as it stands, and every test that it names is there."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora
from lora.config import PEFT_NAMES

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_the_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert "trainable params" in capsys.readouterr().out
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_named_tests_exist():
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", TEXT + (ROOT / "docs" / "peers.md").read_text())
    assert len(named) > 10
    assert not [name for name in named if f"def {name}(" not in tests]


def test_the_files_of_the_reading_order_exist():
    tree = TEXT[TEXT.index("## Reading order") :]
    files = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    assert not named - files
    ours = [path for part in ("lora", "gpt2", "scripts") for path in (ROOT / part).rglob("*.py")]
    assert not {path.name for path in ours} - named - {"__init__.py"}


def numbers(text: str) -> set[float]:
    """Every number in a text."""
    return {float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\.?\d*", text)}


def test_figures_in_prose_are_those_of_the_results():
    measured = numbers((ROOT / "benchmarks" / "RESULTS.md").read_text())
    head = TEXT[: TEXT.index("make qa")]
    reasons = "".join(re.findall(r"^- \*\*.+(?:\n  .+)*", head, re.MULTILINE))
    rank = TEXT[TEXT.index("## Which rank") : TEXT.index("## On several GPUs")]
    bleu = re.findall(r"\b\d\d\.\d\b", rank)
    assert len(bleu) > 10
    assert {float(figure) for figure in bleu} <= measured
    for figure in re.findall(r"\d+\.\d+", reasons):
        places = len(figure.partition(".")[2])
        assert float(figure) in {round(n, places) for n in measured}, figure


def test_the_speeds_are_those_of_the_results():
    """Each figure of the table is one of RESULTS.md, rounded."""
    measured = numbers((ROOT / "benchmarks" / "RESULTS.md").read_text())
    table = re.findall(r"^\|[^|]+\|(.+)\|$", TEXT[TEXT.index("## Speed") :], re.MULTILINE)
    figures = [n for cells in table for n in re.findall(r"\d[\d,]*(?:\.\d+)?", cells)]
    assert len(figures) > 20
    for figure in figures:
        places = len(figure.partition(".")[2])
        assert float(figure.replace(",", "")) in {round(n, places) for n in measured}, figure


def test_the_first_screen_says_what_why_and_how():
    screen = TEXT.splitlines()[:25]
    assert "make qa" in "".join(screen)
    assert sum(line.startswith("- **") for line in screen) == 3
    assert len(TEXT.splitlines()) < 400


def test_every_link_leads_somewhere():
    headings = re.findall(r"^## (.+)$", TEXT, re.MULTILINE)
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings
    }
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert target[1:] in anchors if target[0] == "#" else (ROOT / target).exists(), target


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


def test_the_finalists_in_prose_are_those_of_the_config():
    config = (ROOT / "scripts" / "configs" / "search_e2e.yaml").read_text()
    number = {"2": "two", "4": "four"}[re.search(r"^finalists: (\d)$", config, re.MULTILINE)[1]]
    assert re.findall(r"Its (\w+)\s+finalists", TEXT) in ([], [number])


def test_pefts_names_are_told_as_the_table_tells_them():
    section = TEXT[TEXT.index("## Coming from PEFT") :]
    table = section[: section.index("\n\n- **Ours")]
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
