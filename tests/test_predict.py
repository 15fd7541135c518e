"""`predict.py`: a file of prompts to a file of answers, stopped anywhere and resumed."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gpt2
import lora

for module in ("jsonargparse", "docstring_parser", "yaml", "rich", "matplotlib"):
    pytest.importorskip(module, reason="the scripts need the extra 'scripts'")

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
TOPICS = ("sea", "old castle on the hill", "king", "weather in the north of the country", "bread")
NEW = 5


@pytest.fixture(autouse=True)
def here(small_base, tmp_path, monkeypatch):
    """Twelve prompts of unequal lengths, the first of them twice; an adapter that changes all."""
    monkeypatch.chdir(tmp_path)
    Path("small").symlink_to(small_base)
    rows = [{"prompt": f"{i}. The {TOPICS[i % 5]} is", "completion": f" {i}"} for i in range(12)]
    rows.insert(3, {"prompt": rows[0]["prompt"], "completion": " another"})
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture(scope="module")
def adapter(small_base, tmp_path_factory) -> Path:
    """A run's folder with an adapter in it."""
    model = gpt2.GPT2.from_pretrained(small_base)
    lora.inject(model, r=2, seed=3)
    for module in model.modules():
        if isinstance(module, lora.LoRALinear):
            module.updates["default"].B.data.normal_(std=0.5)
    folder = tmp_path_factory.mktemp("run")
    lora.save(model, folder / "adapter")
    return folder


def predict(*argv: object) -> int:
    script = importlib.import_module("scripts.predict")
    words = ["prompts.jsonl", "--device", "cpu", "--max_new_tokens", NEW, "--base", "small", *argv]
    return script.main([str(word) for word in words])


def lines(file: str | Path = "predictions.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def expected(adapter: Path | None = None, **options) -> list[str]:
    model, tokenizer = gpt2.GPT2.from_pretrained("small"), gpt2.Tokenizer()
    if adapter is not None:
        lora.load(model, adapter / "adapter")
    prompts = dict.fromkeys(e.prompt for e in gpt2.read_examples("prompts.jsonl", prompts=True))
    config = gpt2.GenerateConfig(max_new_tokens=NEW, **options)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    return [tokenizer.decode(row) for row in gpt2.generate(model, ids, config)]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_each_prompt_once_in_order_with_all_its_references(batch_size, capsys):
    assert predict("--batch_size", batch_size) == 0
    found = lines()
    assert [line["prediction"] for line in found] == expected()
    assert [line["prompt"][:2] for line in found] == [f"{i}."[:2] for i in range(12)]
    assert found[0]["references"] == [" 0", " another"]
    assert found[1]["references"] == [" 1"]
    out, error = capsys.readouterr()
    assert out == "0 of 12 answered as a reference (0.0%).\nPredictions: predictions.jsonl\n"
    assert error == ""


def test_answers_lie_beside_the_adapter_and_are_its_own(adapter, tmp_path, capsys):
    output = adapter / "predictions.jsonl"
    assert predict("--adapter", adapter) == 0
    said = [line["prediction"] for line in lines(output)]
    assert said == expected(adapter)
    assert said != expected()
    assert not Path("predictions.jsonl").exists()
    output.unlink()
    capsys.readouterr()


def test_beams_and_several_ends():
    options = {"num_beams": 3, "length_penalty": 0.8, "no_repeat_ngram": 2, "eos": (50256, 13)}
    flags = [f"--{name}={list(v) if type(v) is tuple else v}" for name, v in options.items()]
    assert predict(*flags, "--batch_size", 7) == 0
    assert [line["prediction"] for line in lines()] == expected(**options)


def test_each_prompt_draws_its_own_numbers_however_it_is_batched_and_resumed():
    said = expected(temperature=1.0, seed=7)
    flags = ["--temperature", 1, "--seed", 7]
    assert predict(*flags, "--batch_size", 5) == 0
    assert [line["prediction"] for line in lines()] == said
    file = Path("predictions.jsonl")
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    assert predict(*flags, "--batch_size", 2) == 0
    assert [line["prediction"] for line in lines()] == said


def test_an_exact_answer_is_counted(capsys):
    said = expected()
    prompts = dict.fromkeys(e.prompt for e in gpt2.read_examples("prompts.jsonl", prompts=True))
    rows = [{"prompt": p, "completion": s} for p, s in zip(prompts, said, strict=True)]
    rows[0]["completion"] = " no"
    rows[1] = {"prompt": rows[1]["prompt"]}
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert predict() == 0
    assert "10 of 11 answered as a reference (90.9%)" in capsys.readouterr().out
    assert "references" not in lines()[1]


# --- stopped and resumed -------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1, 7, 12])
@pytest.mark.parametrize("torn", ["", '{"prompt": "0. Th', '{"prompt": "é'])
def test_it_goes_on_after_the_last_whole_line(kept, torn, monkeypatch):
    assert predict() == 0
    whole = Path("predictions.jsonl").read_bytes()
    cut = b"".join(whole.splitlines(keepends=True)[:kept]) + torn.encode()[:-1]
    Path("predictions.jsonl").write_bytes(cut)
    asked: list[int] = []
    real = gpt2.generate
    monkeypatch.setattr(
        gpt2, "generate", lambda model, ids, config: asked.extend(ids) or real(model, ids, config)
    )
    assert predict("--batch_size", 2) == 0
    assert Path("predictions.jsonl").read_bytes() == whole
    assert len(asked) == 12 - kept


def test_what_stops_it_says_how_to_go_on(monkeypatch, capsys):
    real, calls = gpt2.generate, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(gpt2, "generate", stopping)
    assert predict("--batch_size", 1) == 130
    assert len(lines()) == 4
    error = capsys.readouterr().err
    assert "Interrupted. 4 of 12 prompts are answered in predictions.jsonl" in error
    assert error.count("\n") == 1
    monkeypatch.setattr(gpt2, "generate", real)
    assert predict() == 0
    assert [line["prediction"] for line in lines()] == expected()


def test_a_killed_run_goes_on():
    rows = [{"text": f"{i}. The {TOPICS[i % 5]} is"} for i in range(150)]
    Path("many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(SCRIPTS / "predict.py"), "many.jsonl", "--max_new_tokens", "2"]
    command += ["--base", "small", "--device", "cpu", "--batch_size"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    process = subprocess.Popen([*command, "1"], env=environment, stdout=subprocess.DEVNULL)
    file = Path("predictions.jsonl")
    while not (file.exists() and file.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(file.read_text().splitlines()) < 150
    assert importlib.import_module("scripts.predict").main([*command[2:], "64"]) == 0
    assert [line["prompt"] for line in lines()] == [row["text"] for row in rows]


# --- what is refused -----------------------------------------------------------------------------


def refused(capsys, *argv: object) -> str:
    """The one line of stderr; the answers stay as they were."""
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    capsys.readouterr()
    assert predict(*argv) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before
    return error


def test_another_adapter_options_or_prompts_are_refused(adapter, capsys):
    assert predict() == 0
    assert "made with other options: seed was 0, is 4." in refused(capsys, "--seed", 4)
    said = refused(capsys, "--adapter", adapter, "--output", "predictions.jsonl")
    assert "made with other options: adapter was None, is '" in said
    assert "--overwrite" in said
    text = Path("prompts.jsonl").read_text()
    Path("prompts.jsonl").write_text(text + '{"prompt": "More", "completion": " x"}\n')
    assert "prompts was '" in refused(capsys)
    assert predict("--overwrite") == 0
    assert len(lines()) == 13


def test_a_base_or_an_adapter_that_changed_under_its_name_is_refused(adapter, tmp_path, capsys):
    model = gpt2.GPT2.from_pretrained("small")
    model.save_pretrained("base")
    own = tmp_path / "own"
    shutil.copytree(adapter / "adapter", own)
    run = ["--base", "base", "--output", "said.jsonl"]
    assert predict(*run) == 0
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] += 1e-3
    model.save_pretrained("base")
    said = refused(capsys, *run)
    assert "said.jsonl was made with other options: base's weights was '" in said
    assert "', is '" in said
    assert predict("--adapter", own, "--output", "own.jsonl") == 0
    weights = own / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, weights)
    said = refused(capsys, "--adapter", own, "--output", "own.jsonl")
    assert "own.jsonl was made with other options: adapter was '" in said


@pytest.mark.skipif(sys.platform == "win32", reason="needs locks")
def test_two_at_one_output_at_once_are_refused_in_a_line(capsys, monkeypatch):
    real = gpt2.generate

    def another(model, ids, config):
        monkeypatch.setattr(gpt2, "generate", real)
        said = refused(capsys, "--overwrite")
        assert said == "Another run works in predictions.jsonl: wait, or name another --output.\n"
        assert predict("--output", "other.jsonl") == 0
        return real(model, ids, config)

    monkeypatch.setattr(gpt2, "generate", another)
    assert predict() == 0
    assert lines() == lines("other.jsonl")
    assert predict() == 0


def test_a_file_of_somebody_else_is_not_touched(capsys):
    Path("predictions.jsonl").write_text("mine\n")
    assert "made.json is missing beside predictions.jsonl" in refused(capsys)
    Path("folder").mkdir()
    assert "Is a directory" in refused(capsys, "--output", "folder")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch_size", 0], 'Parser key "batch_size"'),
        (["--num_beams", 2, "--temperature", 0.5], "temperature does not go with num_beams 2"),
        (["--adapter", "nowhere"], "nowhere"),
        (["--max_new_tokens", 1024], "does not fit a context of 1024"),
        (["--beams", 3], "There is no option --beams"),
    ],
)
def test_bad_input_is_one_line(argv, message, capsys):
    assert message in refused(capsys, *argv)
