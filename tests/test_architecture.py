"""The laws about the code itself: who imports whom, what is public, how large a file may be."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import pydoc
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lora
from tests.toys import adapted, tiny_gpt2

ROOT = Path(__file__).parents[1]
PACKAGES = ("lora", "gpt2")
SOURCES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
# The core of lora reads as if its wings were not there; these ask one, in one place each.
SEAMS = {
    ("lora.layer", "lora.fast"),
    ("lora.routing", "lora.fast"),
    ("lora.algebra", "lora.disk"),
}
# What the core of gpt2 asks of gpt2.fast: six questions, each with the files that ask it.
QUESTIONS = {
    "gpt2.fast.attention.attend": {"gpt2.model"},
    "gpt2.fast.dropout.drop": {"gpt2.model"},
    "gpt2.fast.head.summed_loss": {"gpt2.model"},
    "gpt2.fast.products.linear": {"gpt2.model"},
    "gpt2.fast.decoding.Steps": {"gpt2.generation", "gpt2.beams"},
}
# What each package of gpt2 may import of it: loss, files <- data <- training <- population.
BELOW = {
    "gpt2.fast": {"gpt2.fast", "gpt2.loss", "gpt2.cache"},
    "gpt2.data": {"gpt2.data", "gpt2.fast", "gpt2.loss", "gpt2.files"},
}
FACE = {"lora": 28, "gpt2": 32}
# Methods that change what they are called on.
CHANGING = (
    "append add update pop setdefault extend clear insert remove discard popitem sort".split()
)


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in SOURCES}
CORE_FILES = [n for n, f in MODULES.items() if n.count(".") == 1 and f.name != "__init__.py"]


def nodes(file: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(file.read_text()))


def imports(file: Path) -> Iterator[tuple[str, str]]:
    """Every import anywhere in a file: the module by its full name, and the name imported of it."""
    for node in nodes(file):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Scripts are a package of one name here and of another where they are installed.
            assert not node.level or file in SCRIPTS, f"{file}: relative import"
            for alias in node.names if not node.level else ():
                full = f"{node.module}.{alias.name}"
                yield (full, "") if full in MODULES else (str(node.module), alias.name)


def imported(file: Path) -> set[str]:
    return {module for module, _ in imports(file)}


def test_the_direction_of_imports():
    outside = {"scripts", "tests", "benchmarks", "transformers", "peft", "pickle"}
    forbidden = {
        **{file: outside | {"gpt2" if "lora" in file.parts else "lora"} for file in SOURCES},
        **{file: {"transformers", "peft", "tests"} for file in SCRIPTS},
    }
    for file, names in forbidden.items():
        roots = {module.partition(".")[0] for module in imported(file)}
        assert not roots & names, file
    for file in sorted((ROOT / "tests").rglob("*.py")):
        assert not {module for module in imported(file) if module.startswith("tests.test_")}, file
    for name, file in MODULES.items():
        package = name.rpartition(".")[0]
        for module in imported(file):
            if package in BELOW and module.startswith("gpt2."):
                assert ".".join(module.split(".")[:2]) in BELOW[package], f"{name}: {module}"
            if package != "gpt2.population":
                assert not module.startswith("gpt2.population"), f"{name}: {module}"


def test_the_core_asks_its_wings_at_the_seams_only():
    seams: set[tuple[str, str]] = set()
    questions: dict[str, set[str]] = {}
    for name in CORE_FILES:
        for module, asked in imports(MODULES[name]):
            wing = ".".join(module.split(".")[:2])
            if wing.startswith("lora.") and MODULES.get(wing, ROOT).name == "__init__.py":
                seams.add((name, wing))
            if wing == "gpt2.fast":
                questions.setdefault(f"{module}.{asked}".rstrip("."), set()).add(name)
    assert seams == SEAMS
    assert questions == QUESTIONS
    assert sum(map(len, questions.values())) <= 6


def test_no_file_imports_in_a_circle():
    graph = {name: imported(file) & MODULES.keys() for name, file in MODULES.items()}
    faces = {name for name, file in MODULES.items() if file.name == "__init__.py"}
    assert not [(n, f) for n, needs in graph.items() for f in needs & faces if n not in faces]
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("package", PACKAGES)
def test_the_face_is_exact_small_and_documented(package):
    """The docstring lists each public name; with `__all__` pydoc would print a book."""
    module = importlib.import_module(package)
    listed = re.findall(r"^    (\w+)  +\S", module.__doc__ or "", re.MULTILINE)
    modules = {name for name, value in vars(module).items() if isinstance(value, type(sys))}
    public = {n for n in vars(module) if not n.startswith("_")} - modules - {"annotations"}
    assert public == set(listed) - modules
    assert len(set(listed)) == len(listed) <= FACE[package]
    for name in listed:
        value = getattr(module, name)
        assert not callable(value) or value.__doc__, f"{package}.{name} has no docstring"
    assert not {f"{package}.{name}" for name in public} & MODULES.keys()  # none hides a module
    page = pydoc.plain(pydoc.render_doc(module))
    assert len(page.splitlines()) < 130
    assert all(name in page for name in listed)


def test_no_prints_seeds_environment_or_state_of_modules():
    """What stands at a file's top level is a constant, or a function's cache."""
    forbidden = ("print", "torch.manual_seed", "os.getenv", "torch.load", "os.environ")
    for file in SOURCES:
        top: set[str] = set()
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                top |= {target.id for target in targets if isinstance(target, ast.Name)}
        for node in nodes(file):
            assert not isinstance(node, ast.Global), file
            if isinstance(node, ast.Name | ast.Attribute):
                assert ast.unparse(node) not in forbidden, f"{file}: {ast.unparse(node)}"
            if isinstance(node, ast.Subscript | ast.Attribute):
                changing = isinstance(node, ast.Attribute) and node.attr in CHANGING
                if changing or isinstance(node.ctx, ast.Store):
                    assert ast.unparse(node.value) not in top, f"{file}: {ast.unparse(node)}"


def test_importing_touches_no_random_state_and_little_else():
    code = (
        "import torch; s = torch.get_rng_state(); t = torch.get_num_threads(); "
        "d = torch.get_default_dtype(); import lora, gpt2, sys; "
        "assert torch.equal(s, torch.get_rng_state()) and t == torch.get_num_threads(); "
        "assert d == torch.get_default_dtype(); "
        "assert not {'transformers', 'peft', 'huggingface_hub', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# Lines of Python as `wc -l` counts them: they only fall, but for what a new capability is given.
BUDGET = {
    "lora": 3_276,
    "gpt2": 5_326,
    "scripts": 3_750,
    "tests": 18_465,
    "benchmarks": 1_924,
}
MOST_LINES = {"lora": 400, "gpt2": 400, "scripts": 400, "tests": 700, "benchmarks": 400}
# What a newcomer reads first, and the data's rooms.
CORE = "layer config layout tree targets injection bank merging".split()
PARTS = {
    "lora core": ([ROOT / "lora" / f"{name}.py" for name in CORE], 1_350),
    "gpt2 core": (sorted((ROOT / "gpt2").glob("*.py")), 1_458),
    "gpt2/data": (sorted((ROOT / "gpt2" / "data").glob("*.py")), 940),
}
# Characters a line and the share of blank lines when the budget began, and how far a line may have
# grown: lines do not go by becoming denser.
DENSITY = {
    "lora": (40.53, 0.1876, 0.05),
    "gpt2": (40.64, 0.1849, 0.05),
    "scripts": (39.48, 0.1770, 0.05),
}


@pytest.mark.parametrize("package", BUDGET)
def test_the_house_keeps_its_budget(package):
    texts = {file: file.read_text() for file in sorted((ROOT / package).rglob("*.py"))}
    lines = {file: text.count("\n") for file, text in texts.items()}
    total = sum(lines.values())
    assert total <= BUDGET[package]
    assert not {f.name: n for f, n in lines.items() if n > MOST_LINES[package]}
    if package in DENSITY:
        width, blank, grown = DENSITY[package]
        whole = "".join(texts.values())
        assert len(whole) <= BUDGET[package] * width * (1 + grown)
        assert len(whole) / total == pytest.approx(width, rel=grown)
        assert sum(not line.strip() for line in whole.splitlines()) / total >= 0.95 * blank
        assert "fmt: off" not in whole
        assert "fmt: skip" not in whole


@pytest.mark.parametrize("part", PARTS)
def test_the_parts_keep_theirs(part):
    files, most = PARTS[part]
    assert sum(file.read_text().count("\n") for file in files) <= most


def test_a_reader_of_a_verb_enters_few_files(tmp_path):
    """The files of `lora` whose functions one call on the demo's shape runs."""
    model, package = tiny_gpt2(), Path(lora.__file__).parent
    saved = adapted()
    lora.save(saved, tmp_path)
    verbs = [
        (lambda: lora.inject(model, r=2), 8),
        (lambda: lora.merge(saved), 4),
        (lambda: lora.load(model, tmp_path, adapter="other"), 9),
    ]
    for call, most in verbs:
        entered: set[str] = set()

        def enter(frame, event, _, entered=entered):
            file = Path(frame.f_code.co_filename)
            if event == "call" and file.is_relative_to(package):
                entered.add(file.name)

        sys.setprofile(enter)
        try:
            call()
        finally:
            sys.setprofile(None)
        assert len(entered) <= most, entered


def test_the_readme_prints_the_budget():
    readme = (ROOT / "README.md").read_text()
    shown = [f"{package} {BUDGET[package]:,}" for package in ("lora", "gpt2", "scripts")]
    assert f"Lines of Python: {', '.join(shown)};" in readme


def test_a_face_that_is_not_installed_has_no_version_and_says_so(monkeypatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    face = importlib.import_module("lora")
    assert not hasattr(face, "__version__")
    with pytest.raises(AttributeError, match="lora-gpt2 is not installed"):
        _ = face.__version__
