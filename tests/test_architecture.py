"""The laws about the code itself: who imports whom, what is public, what never appears."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("lora", "gpt2")
SOURCES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]


def imports(file: Path) -> set[str]:
    """The top-level names that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_direction_of_imports(file):
    stranger = {"lora": "gpt2", "gpt2": "lora"}[file.relative_to(ROOT).parts[0]]
    forbidden = {stranger, "scripts", "tests", "benchmarks", "transformers", "peft", "pickle"}
    assert not imports(file) & forbidden


def test_scripts_need_neither_transformers_nor_peft():
    for file in (ROOT / "scripts").glob("*.py"):
        assert not imports(file) & {"transformers", "peft", "tests"}


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_exact_and_sorted(package):
    module = importlib.import_module(package)
    public = {n for n, v in vars(module).items() if not n.startswith("_") and not is_module(v)}
    assert public == {n for n in module.__all__ if not is_module(getattr(module, n))}
    for name in module.__all__:
        value = getattr(module, name)
        assert not callable(value) or value.__doc__, f"{package}.{name} has no docstring"


def is_module(value: object) -> bool:
    return isinstance(value, type(sys)) or getattr(value, "__name__", "") == "annotations"


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_prints_seeds_environment_or_globals(file):
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "torch.manual_seed", "os.getenv", "torch.load"), called
        assert not isinstance(node, ast.Global)
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "os.environ"


def test_importing_touches_no_random_state_and_little_else():
    code = (
        "import torch; s = torch.get_rng_state(); t = torch.get_num_threads(); "
        "d = torch.get_default_dtype(); import lora, gpt2, sys; "
        "assert torch.equal(s, torch.get_rng_state()) and t == torch.get_num_threads(); "
        "assert d == torch.get_default_dtype(); "
        "assert not {'transformers', 'peft', 'huggingface_hub', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_files_keep_to_their_size():
    """Under about 250 lines a file and 100 a script: what outgrows its room is two rooms."""
    for file in SOURCES:
        assert len(file.read_text().splitlines()) <= 265, file
    for file in (ROOT / "scripts").glob("*.py"):
        runs = "if __name__" in file.read_text()  # the others are rooms that scripts share
        assert len(file.read_text().splitlines()) <= (115 if runs else 150), file
