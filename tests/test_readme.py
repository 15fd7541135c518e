"""README.md: its Python runs as it stands, and every test that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

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
    named = re.findall(r"`(test_\w+)`", TEXT)
    assert len(named) > 10
    assert not [name for name in named if f"def {name}(" not in tests]


def test_the_files_of_the_reading_order_exist():
    tree = TEXT[TEXT.index("## Reading order") :]
    files = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    assert not named - files
    ours = [path for part in ("lora", "gpt2", "scripts") for path in (ROOT / part).rglob("*.py")]
    assert not {path.name for path in ours} - named - {"__init__.py"}


def test_the_speeds_are_those_of_the_results():
    """Each figure of the table is one of RESULTS.md, rounded."""
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    measured = {float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\.?\d*", results)}
    table = re.findall(r"^\|[^|]+\|(.+)\|$", TEXT[TEXT.index("## Speed") :], re.MULTILINE)
    figures = [n for cells in table for n in re.findall(r"\d[\d,]*(?:\.\d+)?", cells)]
    assert len(figures) > 20
    for figure in figures:
        places = len(figure.partition(".")[2])
        assert float(figure.replace(",", "")) in {round(n, places) for n in measured}, figure
