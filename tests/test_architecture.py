"""The laws about the code itself: who imports whom, what is public, how large a room may be."""

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
    "attention.attend": {"gpt2.model"},
    "dropout.drop": {"gpt2.model"},
    "head.summed_loss": {"gpt2.model"},
    "products.linear": {"gpt2.model"},
    "decoding.Steps": {"gpt2.generation", "gpt2.beams"},
}
FACE = {"lora": 28, "gpt2": 30}
ids = {"ids": lambda file: str(file.relative_to(ROOT))}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in SOURCES}


def imported(file: Path) -> Iterator[str]:
    """Everything that a file imports, anywhere in it, by its full name."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if (
                file in SCRIPTS and node.level
            ):  # they are a package of one name here, another installed
                continue
            assert node.level == 0, f"{file}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)


def roots(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(file)}


@pytest.mark.parametrize("file", SOURCES, **ids)
def test_the_direction_of_imports(file):
    stranger = {"lora": "gpt2", "gpt2": "lora"}[module_name(file).partition(".")[0]]
    forbidden = {stranger, "scripts", "tests", "benchmarks", "transformers", "peft", "pickle"}
    assert not roots(file) & forbidden


@pytest.mark.parametrize("file", SOURCES, **ids)
def test_the_core_asks_its_wings_at_the_seams_only(file):
    here = module_name(file)
    if here in PACKAGES or here.count(".") > 1 or file.name == "__init__.py" or "gpt2" in here:
        return  # the face, and the wings themselves
    for name in imported(file):
        package, _, rest = name.partition(".")
        wing = f"{package}.{rest.partition('.')[0]}"
        if package in PACKAGES and (ROOT / package / rest.partition(".")[0]).is_dir():
            assert (here, wing) in SEAMS, f"{here} imports {name}"


def test_the_core_of_gpt2_asks_its_fast_wing_six_questions_at_most():
    asked: dict[str, set[str]] = {}
    for name, file in MODULES.items():
        if name.startswith("gpt2.") and name.count(".") == 1 and file.name != "__init__.py":
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("gpt2.fast"):
                    wing = str(node.module).removeprefix("gpt2.fast").lstrip(".")
                    for alias in node.names:
                        asked.setdefault(f"{wing}.{alias.name}".lstrip("."), set()).add(name)
    assert asked == QUESTIONS
    assert sum(map(len, asked.values())) <= 6


def test_packages_of_gpt2_import_one_way():
    """loss, files <- data <- training <- population; fast needs the core's lowest files only."""
    packages = {
        "gpt2.fast": {"gpt2.fast", "gpt2.loss", "gpt2.cache"},
        "gpt2.data": {"gpt2.data", "gpt2.fast", "gpt2.loss", "gpt2.files"},
    }
    for file in SOURCES:
        package = module_name(file).rpartition(".")[0]
        for name in imported(file):
            if package in packages and name.startswith("gpt2."):
                above = ".".join(name.split(".")[:2])
                assert above in packages[package], f"{module_name(file)} imports {name}"
            if package != "gpt2.population":
                assert not name.startswith("gpt2.population"), f"{module_name(file)} imports {name}"


def test_no_file_imports_in_a_circle():
    graph = {name: {n for n in imported(file) if n in MODULES} for name, file in MODULES.items()}
    faces = {name for name, file in MODULES.items() if file.name == "__init__.py"}
    assert not [(n, f) for n, needs in graph.items() for f in needs & faces if n not in faces]
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_scripts_need_neither_transformers_nor_peft():
    for file in SCRIPTS:
        assert not roots(file) & {"transformers", "peft", "tests"}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_face_is_exact_small_and_documented(package):
    """The docstring lists each public name; with `__all__` pydoc would print a book."""
    module, listed = importlib.import_module(package), face(package)
    public = {n for n, v in vars(module).items() if not n.startswith("_") and not is_module(v)}
    assert public == {n for n in listed if not is_module(getattr(module, n))}
    assert len(set(listed)) == len(listed) <= FACE[package]
    for name in listed:
        value = getattr(module, name)
        assert not callable(value) or value.__doc__, f"{package}.{name} has no docstring"


@pytest.mark.parametrize("package", PACKAGES)
def test_pydoc_of_a_face_is_a_page(package):
    page = pydoc.plain(pydoc.render_doc(importlib.import_module(package)))
    assert len(page.splitlines()) < 130
    assert all(name in page for name in face(package))


def test_no_public_function_hides_a_module():
    for package in PACKAGES:
        module = importlib.import_module(package)
        names = getattr(module, "__all__", None) or face(package)
        functions = {n for n in names if not is_module(getattr(module, n))}
        children = {name.rpartition(".") for name in MODULES}
        assert not functions & {child for parent, _, child in children if parent == package}


def face(package: str) -> list[str]:
    """The names that a package's docstring lists, a line each."""
    return re.findall(
        r"^    (\w+)  +\S", importlib.import_module(package).__doc__ or "", re.MULTILINE
    )


def is_module(value: object) -> bool:
    return isinstance(value, type(sys)) or getattr(value, "__name__", "") == "annotations"


@pytest.mark.parametrize("file", SOURCES, **ids)
def test_no_prints_seeds_environment_or_globals(file):
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "torch.manual_seed", "os.getenv"), called
            assert called != "torch.load"
        assert not isinstance(node, ast.Global)
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "os.environ"


@pytest.mark.parametrize("file", SOURCES, **ids)
def test_what_a_module_keeps_is_never_changed(file):
    """No global state: what stands at a file's top level is a constant, or a function's cache."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {t.id for t in targets if isinstance(t, ast.Name)}
            written = {
                ast.unparse(n.value)
                for n in ast.walk(ast.parse(file.read_text()))
                if isinstance(n, ast.Subscript | ast.Attribute) and isinstance(n.ctx, ast.Store)
            }
            assert not names & written, f"{file.name}: {names & written} is written to"


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
    "lora": 3_200,
    "gpt2": 5_572,
    "scripts": 3_245,
    "tests": 19_204,
    "benchmarks": 1_797,
}
MOST_LINES = {"lora": 400, "gpt2": 400, "scripts": 400, "tests": 700, "benchmarks": 400}
# What a newcomer reads first, and the data's rooms.
CORE = "layer config layout tree targets injection bank merging".split()
PARTS = {
    "lora core": ([ROOT / "lora" / f"{name}.py" for name in CORE], 1_350),
    "gpt2 core": (sorted((ROOT / "gpt2").glob("*.py")), 1_479),
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
