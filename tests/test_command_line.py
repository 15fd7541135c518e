"""Command lines as people mistype them, and as they mean them: `main(argv)` in this process."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import lora
from tests.script_runs import ROOT, SCRIPTS, record_of, times_of

LONG = "x" * 50_000


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """This folder has odd things in it."""
    monkeypatch.chdir(tmp_path)
    Path("run", "adapter").mkdir(parents=True)
    Path("run", "run.json").write_text("{}")
    Path("folder.jsonl").mkdir()
    Path("file").write_text("x")
    Path("binary.yaml").write_bytes(bytes(range(256)))
    Path("binary.jsonl").write_bytes(bytes(range(256)) * 9)
    for name in ("base", "a.b", "fine"):
        Path(f"{name}.jsonl").write_text('{"text": "a b c"}')
    return tmp_path


def refused(script: str, argv: list[str], here: Path, capsys) -> str:
    """The one line of stderr; nothing else was written anywhere."""
    before = times_of(here)
    assert importlib.import_module(f"scripts.{script}").main(argv) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert 12 < len(error) <= 1002
    assert error.isascii() or "�" not in error
    assert times_of(here) == before
    return error


# One a kind of fault.
YAMLS = {
    "lora: null": "There is no option lora: did you mean lora.r?",
    "data: [1]": "Parser key \"data\": Expected a <class 'str'>. Got value: [1]",
    "tasks: [1]": "Parser key \"tasks\" element 1: Expected a <class 'str'>",
    "strategy: steps": "There is no option strategy: did you mean logging_steps?",
    "learning_rate: 1": "did you mean lr?",
    "epoch: 3": "did you mean epochs?",
    "r: 4": "did you mean lora.r?",
    "lora: {rank: 4}": "did you mean lora.r?",
    "lora: {dropuot: 4}": "did you mean lora.dropout?",
    "nope: 1\nalso_nope: 2": "did you mean compile? config.yaml: There is no option also_nope",
    "- a": "must hold options",
    "": "must hold options",
    "a: b: c": "is not YAML",
    "seed: !!python/name:os.system": "is not YAML",
    "epochs: 1\nsteps: 1": "give epochs or steps, and not both",
    "seed: 1": "give epochs or steps",
    "epochs: 1.5": 'Parser key "epochs": Does not validate',
    "lr: .nan\nepochs: 1": "lr must be in (0, inf), got nan",
    "overwrite: maybe": "Expected a <class 'bool'>. Got value: maybe",
    "max_token_length: 1": "1 does not conform to restriction v>=2",
    "fields: {frage: a}\nepochs: 1": "has no 'a', only",
    "lora: {targets: []}\nepochs: 1": "targets must name at least one layer.",
}


@pytest.mark.parametrize(("text", "said"), YAMLS.items(), ids=lambda t: t[:30].replace("\n", " "))
def test_a_bad_config_is_one_line(text, said, here, capsys):
    Path("config.yaml").write_text(text)
    assert said in refused("train_qa", ["--config", "config.yaml"], here, capsys)


LINES = {
    "--r 4": "There is no option --r: did you mean --lora.r?",
    "--res_pth folder": "did you mean --res_path?",
    "--lora.lora_alpha 1": "There is no option --lora.lora_alpha: did you mean --lora.alpha?",
    "stray": "unrecognized arguments: stray",
    f"--{LONG} 1": "There is no option --xxxx",
    f"--seed {LONG}": "Parser key \"seed\": Expected a <class 'int'>",
    "--seed": "expected one argument",
    "--epochs 1 --steps 1": "give epochs or steps, and not both",
    "--epochs 0": "epochs must be an integer of at least 1, got 0",
    "--lr fast": "Parser key \"lr\": Expected a <class 'float'>. Got value: fast",
    "--logging_steps 0": "0 does not conform to restriction v>0",
    "--config nowhere.yaml": "The config nowhere.yaml is missing or no file",
    "--config": "The config . is missing or no file",
    "--config binary.yaml": "is not YAML: unacceptable character",
    "--device abacus": "device must be cpu, mps, cuda or cuda:N, got 'abacus'",
    "--device cuda:99": "cannot be used here",
    "--model_name ''": "lacks config.json; model.safetensors",
    "--model_name no/such/thing": "There is no folder or file 'no/such/thing'. Pass gpt2, ",
    "--model_name file": "file lacks config.json. Only safetensors are read",
    "--res_path run": "run holds a run (adapter, run.json)",
    "--res_path file/below": "cannot be written",
    "--res_path ''": "res_path '' names no folder",
    "--data ''": "has none of the endings",
    "--data folder.jsonl": "Is a directory: 'folder.jsonl'",
    "--data nowhere.jsonl": "No such file or directory: 'nowhere.jsonl'",
    "--data binary.jsonl": "binary.jsonl:1: Expecting value",
    f"--data {LONG}.csv": "File name too long",
    "--data fine.jsonl --fields.question t": "has no 't', only ['text']",
    "--resume ''": "resume is empty: leave it out.",
    "--prompts file": "file has none of the endings",
    "--prompts base.jsonl --generate.max_new_tokens 1022": "and 1,022 new ones, does not fit",
    "--tasks fine.jsonl ./fine.jsonl": "needs different names",
    "--tasks base.jsonl": "not base or mixture: got",
    "--tasks fine.jsonl a.b.jsonl": "'a.b' cannot name an adapter",
    "--tasks fine.jsonl --generate.num_beams 2": "generate.num_beams must be 1",
    "--lora.slices '[q]'": "no target names any, such as 'c_attn[q,v]'",
    "--lora.r 100000": "r 100000 is above 256, its smaller side",
    "--lora.targets q_proj": "No module matches target 'q_proj'. Linear modules here end in:",
    "--generate.top_p 2": "top_p must be in (0, 1], got 2.0",
}


@pytest.mark.parametrize(("line", "said"), LINES.items(), ids=lambda t: t[:40])
def test_a_bad_line_of_train_is_one_line(line, said, here, capsys):
    assert said in refused("train_qa", shlex.split(line), here, capsys)


OTHERS = {
    "generate": "the following arguments are required: prompt",
    "generate ''": "prompt 0 is empty",
    "generate a --temp 1": "did you mean --temperature?",
    "generate a --config x": "There is no option --config",
    "generate a --adapter run": "run has no adapter_config.json",
    "generate a --adapter '[*'": "[* has no adapter_config.json",
    f"generate '{'a ' * 3000}'": "does not fit a context of 1024",
    "predict fine.jsonl --output '' --adapter ''": "adapter, output is empty",
    "report file": "file holds no run: name a folder of train_qa.py or search.py",
    "merge '' out": "adapter is empty",
    "merge run out": "run has no adapter_config.json",
    "merge run run": "run is not an empty folder",
    "merge run ''": "'' is not an empty folder",
    "merge run file": "file is not an empty folder",
    "merge run out --dtype int8": "Got value: int8",
}


@pytest.mark.parametrize(("line", "said"), OTHERS.items(), ids=lambda t: t[:40])
def test_a_bad_line_of_another_script_is_one_line(line, said, here, capsys):
    script, *argv = shlex.split(line)
    assert said in refused(script, argv, here, capsys)


def test_a_null_byte_and_half_a_character_are_one_line(here, capsys):
    for option in ("--res_path", "--data", "--config", "--model_name", "--prompts"):
        for odd in ("a\0b", "\udcff"):
            if (option, odd) != ("--res_path", "\udcff"):  # which any folder may be called
                refused("train_qa", [option, odd], here, capsys)


def parsed(*argv: str):
    return importlib.import_module("scripts.train_qa").options_of(argv)


def test_without_a_config_the_demo_runs():
    options, demo = parsed(), parsed("--config", str(SCRIPTS / "configs" / "demo.yaml"))
    assert {**options.as_dict(), "config": demo.config} == demo.as_dict()
    assert options.model_name == "demo"
    assert options.epochs == 40


def test_a_flag_for_epochs_or_steps_beats_the_configs_other():
    assert (parsed("--steps", "7").epochs, parsed("--steps", "7").steps) == (None, 7)
    Path("steps.yaml").write_text("steps: 9")
    options = parsed("--config", "steps.yaml", "--epochs", "2")
    assert (options.epochs, options.steps) == (2, None)
    assert parsed("--config", "steps.yaml").steps == 9


def test_dotted_and_nested_keys_are_merged_and_flags_beat_them():
    text = "lora: {r: 4, targets: [c_fc]}\nlora.alpha: 3\nlr: 1e-3\ngenerate.top_k: 5\nclip: null\n"
    Path("c.yaml").write_text(text + "lora.rank_pattern: {c_fc: 2}\noverwrite: true\n")
    options = parsed("--config", "c.yaml", "--lora.r", "6", "--steps", "1")
    assert (options.lora.r, options.lora.alpha, options.lora.targets) == (6, 3, ["c_fc"])
    assert options.lora.rank_pattern == {"c_fc": 2}
    assert parsed("--overwrite", "--steps", "1").overwrite
    assert not parsed("--overwrite", "false").overwrite
    assert (options.lr, options.generate.top_k, options.clip) == (1e-3, 5, None)
    assert options.overwrite
    assert options.lora.dropout == 0


def test_fields_come_as_flags_and_in_yaml():
    flags = parsed("--fields.question", "frage", "--fields.answer=antwort")
    Path("c.yaml").write_text("fields: {question: frage, answer: antwort}")
    assert flags.fields == parsed("--config", "c.yaml").fields
    assert flags.fields == {"question": "frage", "answer": "antwort"}


@pytest.mark.parametrize("script", ["train_qa", "generate", "merge", "predict", "search", "report"])
def test_every_option_has_its_help(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"scripts.{script}").main(["--help"])
    assert stop.value.code == 0
    options = re.findall(r"^  (--?\w.*?|\w+) {2,}(\(type.*|.+)$", capsys.readouterr().out, re.M)
    assert len(options) >= 2
    silent = [name for name, text in options if text.startswith("(type")]
    assert not silent


@pytest.mark.parametrize(("cuda", "mps", "best"), [(1, 1, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_cuda_is_picked_before_mps_before_the_processor(cuda, mps, best, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)
    monkeypatch.setattr("torch.empty", lambda *_, device: None)
    assert importlib.import_module("scripts.runs.processes").pick_device(None) == best


def test_an_adapter_is_found_in_its_run():
    find = importlib.import_module("scripts.runs.folder").adapter_in
    assert find("run") == Path("run")
    Path("run", "adapter", "adapter_config.json").write_text("{}")
    assert find("run") == find("run/adapter") == Path("run", "adapter")
    Path("run", "last").mkdir()
    Path("run", "last", "adapter_config.json").write_text("{}")
    assert find("run") == Path("run", "adapter")
    Path("run", "poet").mkdir()
    Path("run", "poet", "adapter_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match="several adapters: name one of run/adapter, run/last, run/poet"
    ):
        find("run")


def test_the_next_commands_survive_the_shell(monkeypatch):
    folder = importlib.import_module("scripts.runs.folder")
    place, prompt = Path("it's [b]mine[/b] $HOME"), 'Q: "Why" `ls` $(ls)?\nA:'

    def used(adapter, base, prompt):
        return folder.commands([adapter], base, prompt)

    lines = used(place, "a base", prompt)
    words = shlex.split(lines)
    assert words[1].endswith("generate.py")
    assert words[2:7] == [prompt, "--base", "a base", "--adapter", str(place)]
    assert words[8].endswith("merge.py")
    assert words[9:] == [str(place), str(place / "merged"), "--base", "a base"]
    dashed = shlex.split(used(place / "a", "demo", "- item"))
    assert dashed[2:8] == ["--base", "demo", "--adapter", str(place / "a"), "--", "- item"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/lora-gpt2", "train"])
    assert used(place, "demo", "a").startswith("lora-gpt2 generate a ")


def test_a_run_takes_the_next_number_and_a_named_folder_only_if_told():
    folder = importlib.import_module("scripts.runs.folder")
    for number in (1, 2, 3):
        assert folder.prepare(None, "qa", ["adapter"]) == Path("runs", f"qa-{number}")
    Path("run", "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="name another .*, or pass --resume or --overwrite true"):
        folder.check("run", ["adapter"], overwrite=False)
    folder.check("run", ["adapter"], overwrite=True)
    folder.prepare("run", "qa", ["adapter"])
    assert sorted(p.name for p in Path("run").iterdir()) == ["adapter", "notes.txt"]
    folder.check("new/deep", ["adapter"], overwrite=False)
    assert not Path("new").exists()


def test_versions_are_those_of_the_distribution():
    try:
        installed = version("lora-gpt2")
    except PackageNotFoundError:
        pytest.skip("lora-gpt2 is not installed")
    assert lora.__version__ == installed


@pytest.mark.parametrize(
    ("name", "code", "line"),
    [
        ("SIGINT", 130, "Interrupted."),
        ("SIGTERM", 143, "Stopped by SIGTERM."),
        ("SIGHUP", 129, "Stopped by SIGHUP."),
    ],
)
def test_a_signal_during_imports_is_one_line(name, code, line, heeded, tmp_path):
    started, _ = importing(tmp_path)
    started.send_signal(getattr(signal, name))
    _, error = started.communicate(timeout=30)
    assert (started.returncode, error) == (code, f"{line}\n")


def importing(
    folder: Path, running: int = 1, **env: str
) -> tuple[subprocess.Popen[str], list[str]]:
    """A script that has begun to import torch, which takes a minute, and how threads wait there.

    The machine pretends that so many threads run.
    """
    patched = f"import pathlib\npathlib.Path.read_text = lambda *_: '0 0 0 {running}/99 7'"
    (folder / "sitecustomize.py").write_text(patched)
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    shown = f"print(*map(os.environ.get, {names}), flush=True)"
    (folder / "torch.py").write_text(f"import os, time\n{shown}\ntime.sleep(60)")
    started = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "generate.py"), "Once"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, **env, "PYTHONPATH": str(folder)},
    )
    assert started.stdout is not None
    return started, started.stdout.readline().split()


def test_a_script_that_nohup_started_goes_on_when_its_terminal_closes(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        started, _ = importing(tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    started.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    started.send_signal(signal.SIGTERM)
    _, error = started.communicate(timeout=30)
    assert (started.returncode, error) == (143, "Stopped by SIGTERM.\n")


def test_a_script_beside_other_work_waits_without_spinning(tmp_path, monkeypatch):
    """It is set before torch reads it, and never over a user's."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for running, given, expected in (
        (1, {}, ["None", "None"]),
        (2, {}, ["PASSIVE", "10000"]),
        (12, {}, ["PASSIVE", "10000"]),
        (2, {"OMP_WAIT_POLICY": "ACTIVE"}, ["ACTIVE", "None"]),
    ):
        started, waiting = importing(tmp_path, running, **given)
        started.kill()
        started.communicate()
        assert waiting == expected


@pytest.mark.parametrize("name", ["jinja2", "jsonargparse", "yaml", "rich", "matplotlib"])
def test_a_missing_package_of_the_scripts_is_one_line(name, script, monkeypatch, capsys):
    def missing(_: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    start = script("cli.guard").start
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(importlib, "import_module", missing)
    assert start("predict", ["asked.txt"]) == 2
    line = f"{name} is missing: pip install 'lora-gpt2[scripts]'.\n"
    assert capsys.readouterr() == ("", line)


def test_new_results_take_the_place_of_their_own_benchmarks_only():
    replace = importlib.import_module("benchmarks.results").replace
    old, new = Path("old.jsonl"), Path("new.jsonl")
    lines = [json.dumps({"benchmark": name, "case": n}) for n, name in enumerate("aabcc")]
    old.write_text("\n".join(lines) + "\n")
    made = json.dumps({"benchmark": "a", "case": 9})
    new.write_text(made + "\n")
    replace(new, old)
    assert old.read_text().splitlines() == [*lines[2:], made]
    replace(new, Path("none.jsonl"))
    assert Path("none.jsonl").read_text() == new.read_text()


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_bench_removes_no_results():
    printed = subprocess.run(["make", "-n", "bench"], cwd=ROOT, capture_output=True, text=True)
    removed = re.findall(r"\brm\b.*", printed.stdout)
    assert removed == ["rm -f build/cpu.jsonl"]
    assert "--replace build/cpu.jsonl benchmarks/results/cpu.jsonl" in printed.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, built and installed: the environment in which its command is found."""
    pytest.importorskip("setuptools", minversion="77", reason="builds the wheel")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    kept = ("lora", "gpt2", "scripts", "pyproject.toml", "README.md", "LICENSE")
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in kept), str(source)], check=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    how = ["--no-deps", "--no-index", "--no-build-isolation", "--no-compile"]
    subprocess.run([*pip, *how, "--target", str(target), str(source)], check=True)
    path = os.pathsep.join([str(target / "bin"), os.environ["PATH"]])
    others = [path for path in sys.path if Path(path).resolve() != ROOT]  # that of the extras
    python = os.pathsep.join([str(target), *others])
    return {**os.environ, "PYTHONPATH": python, "PATH": path, "HF_HUB_OFFLINE": "1"}


def test_the_installed_command_trains_generates_and_merges_anywhere(installed, here):
    def ran(line: str | list[str]) -> str:
        done = subprocess.run(
            line, shell=isinstance(line, str), capture_output=True, encoding="utf-8", env=installed
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout

    Path("my data.csv").write_text("id,frage,antwort\n1,Why?,So it is.\n")
    fields = ["--fields.question", "frage", "--fields.answer", "antwort"]
    device = ["--device", "cpu"]
    arguments = ["--data", "my data.csv", *fields, "--steps", "2", "--max_token_length", "9"]
    out = ran(["lora-gpt2", "train", *arguments, *device])
    assert "1 examples, 9 tokens; 1 (100.0%) longer than 9 were cut" in out
    answers = record_of(Path("runs", "qa-1"))["answers"]
    assert [answer["prompt"] for answer in answers] == ["Q: Why?\nA:"]
    generate, merge = re.findall(r"lora-gpt2 (?:generate|merge) (?s:.+?)demo.*", out)
    assert ran(generate).startswith("Q: Why?\nA:")
    assert "is merged into 8 layers" in ran(merge)
    assert Path("runs", "qa-1", "merged", "model.safetensors").is_file()
    assert ran(["lora-gpt2", "--version"]) == f"{lora.__version__}\n"
    assert "train,generate,predict,merge" in ran(["lora-gpt2", "--help"])
    for wrong in ([], ["fly"]):
        done = subprocess.run(["lora-gpt2", *wrong], capture_output=True, env=installed)
        assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)


def test_the_base_is_the_one_that_the_adapter_names(tmp_path):
    base_of = importlib.import_module("scripts.runs.folder").base_of
    adapter = tmp_path / "trained" / "adapter"
    adapter.mkdir(parents=True)
    assert base_of(None) == base_of(str(adapter)) == "demo"
    for config, base in (
        ('{"base_model_name_or_path": "gpt2-medium"}', "gpt2-medium"),
        ('{"base_model_name_or_path": null}', "demo"),
        ("{", "demo"),
        ("[]", "demo"),
    ):
        (adapter / "adapter_config.json").write_text(config)
        assert base_of(str(adapter)) == base_of(str(adapter.parent)) == base


def test_print_config_gives_a_file_of_all_options(capsys):
    with pytest.raises(SystemExit) as ended:
        parsed("--lr", "0.5", "--print_config")
    assert ended.value.code == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    once, again = parsed("--lr", "0.5"), parsed("--config", "printed.yaml")
    once.config = again.config
    assert json.dumps(again.as_dict()) == json.dumps(once.as_dict())


def test_flags_win_wherever_the_config_stands(capsys):
    Path("c.yaml").write_text("lr: 0.25\nsteps: 3")
    for words in (["--lr", "0.5", "--config", "c.yaml"], ["--config=c.yaml", "--lr", "0.5"]):
        options = parsed(*words)
        assert (options.lr, options.steps, options.config) == (0.5, 3, "c.yaml")


@pytest.mark.parametrize(
    ("named", "lr", "epochs"), [([], 0.003, 40), (["--config", "article.yaml"], 0.0001, 500)]
)
def test_help_shows_the_defaults_of_the_config(named, lr, epochs, capsys, monkeypatch):
    """The demo's, or those of the file that is named."""
    monkeypatch.chdir(SCRIPTS / "configs")
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as ended:
        parsed(*named, "--help")
    assert ended.value.code == 0
    said = dict(
        re.findall(r"^  --([\w.]+) \S+\s+(?:\S.*)?default: (.*)\)$", capsys.readouterr().out, re.M)
    )
    assert (said["lr"], said["epochs"], said["lora.dropout"]) == (str(lr), str(epochs), "0.1")
