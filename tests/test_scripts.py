"""The scripts as a user runs them: a real run on the demo base, and bad input in one line."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
import transformers

import gpt2
import lora

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
DEMO = str(SCRIPTS / "configs" / "demo.yaml")
BASE = ROOT / "gpt2" / "assets" / "demo"
PHYSICS = "Q: What does physics explain?\nA:"
TRAINED = {
    "Q: How do transformers work?\nA:": {
        " Transformers process sequences using self-attention.",
        " Transformers process sequences using self-attention mechanisms.",
    },
    PHYSICS: {" Physics explains natural phenomena using mathematical models."},
    "Q: What do machine learning models do?\nA:": {
        " Machine learning models learn patterns from data."
    },
}


def command(script: str, *arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPTS / script), *arguments]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The demo's run: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    done = subprocess.run(
        command("train_qa.py", "--config", DEMO, "--res_path", str(folder)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder, done.stdout


@pytest.fixture
def script(monkeypatch):
    """Import a script by its name, as if it had been started."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


@pytest.fixture
def adapted(run):
    """The demo base with the run's adapter."""
    model = gpt2.GPT2.from_pretrained("demo")
    lora.load(model, run[0] / "adapter")
    return model


def test_trained_questions_are_answered_word_for_word_and_the_base_answers_none(run):
    record = json.loads((run[0] / "run.json").read_text(encoding="utf-8"))
    answers = {a["prompt"]: a for a in record["answers"]}
    assert len(answers) == 6
    for prompt, trained in TRAINED.items():
        answer = answers.pop(prompt)
        assert answer["tuned"] in trained
        assert answer["stopped"]
        assert answer["verdict"] == "exact"
        assert set(answer["trained"]) == trained
        assert not any(text.strip() in answer["base"] for text in trained)
    assert {a["verdict"] for a in answers.values()} == {"not trained"}


def test_answers_are_those_of_the_saved_adapter(run, adapted):
    tokenizer = gpt2.Tokenizer()
    config = gpt2.GenerateConfig(max_new_tokens=24)
    for answer in json.loads((run[0] / "run.json").read_text(encoding="utf-8"))["answers"]:
        prompt = tokenizer.encode(answer["prompt"])
        (tuned,) = gpt2.generate(adapted, [prompt], config)
        with lora.disabled(adapted):
            (base,) = gpt2.generate(adapted, [prompt], config)
        assert (tokenizer.decode(tuned), tokenizer.decode(base)) == (
            answer["tuned"],
            answer["base"],
        )


def test_output_is_readable_when_it_is_not_a_terminal(run):
    folder, out = run
    assert "\x1b" not in out
    assert "\r" not in out
    assert "19,446,528" in out
    assert "65,536" in out
    assert "0.3359" in out
    steps = [line for line in out.splitlines() if line.startswith("step ")]
    assert len(steps) == 20
    assert "loss" in steps[-1]
    assert "tokens/s" in steps[-1]
    assert "3 of 3 trained prompts answered word for word." in out
    assert "…" not in out, "a cell was cut"
    (saved,) = (line for line in out.splitlines() if line.startswith(f"Saved in {folder}: "))
    for file in ("adapter", "metrics.jsonl", "loss.png", "answers.md", "run.json"):
        assert file in saved.rpartition(folder.name)[2]


def test_metrics_have_every_step(run):
    lines = (run[0] / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [s["step"] for s in steps] == list(range(1, 501))
    assert steps[0]["loss"] > 5 > 1 > steps[-1]["loss"]
    assert steps[0]["lr"] == pytest.approx(3e-3, rel=0.01)
    assert all(s["tokens"] > 0 and s["seconds"] > 0 and s["grad_norm"] > 0 for s in steps)


def test_answers_and_plot_are_written(run):
    text = (run[0] / "answers.md").read_text(encoding="utf-8")
    assert text.startswith("3 of 3 trained prompts answered word for word.\n")
    rows = text.splitlines()[2:]
    assert len(rows) == 2 + 6
    assert all(row.count(" | ") == 3 for row in (rows[0], *rows[2:]))
    assert (run[0] / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_record_tells_the_whole_run(run):
    record = json.loads((run[0] / "run.json").read_text(encoding="utf-8"))
    assert record["config"]["seed"] == 42
    assert record["config"]["lora"]["dropout"] == 0.1
    assert record["versions"]["torch"] == torch.__version__
    assert record["parameters"]["LoRA"] == {"trainable": 65536, "total": 19512064}
    assert record["data"]["examples"] == 5
    assert record["data"]["truncated"] == 0
    assert set(record["seconds"]) == {"load", "base answers", "training", "tuned answers"}


def test_peft_loads_the_adapter_with_equal_logits(run, adapted):
    base = transformers.GPT2LMHeadModel.from_pretrained(BASE, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, run[0] / "adapter").eval()
    idx = torch.tensor([gpt2.Tokenizer().encode(PHYSICS)])
    with torch.no_grad():
        torch.testing.assert_close(adapted(idx), theirs(idx).logits, rtol=1e-5, atol=1e-4)


def test_merge_writes_what_transformers_loads(run, adapted, script, tmp_path, capsys):
    out = tmp_path / "merged"
    merge = script("merge").main
    assert merge([str(run[0] / "adapter"), str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    theirs = transformers.GPT2LMHeadModel.from_pretrained(out)
    idx = torch.tensor([gpt2.Tokenizer().encode(PHYSICS)])
    with torch.no_grad(), lora.merged(adapted):
        torch.testing.assert_close(adapted(idx), theirs(idx).logits, rtol=1e-5, atol=1e-4)
    before = (out / "model.safetensors").read_bytes()
    assert merge([str(run[0] / "adapter"), str(out)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == before


def test_merge_never_overwrites_the_base(run, script, capsys):
    before = {file.name: file.stat().st_mtime_ns for file in BASE.iterdir()}
    assert script("merge").main([str(run[0] / "adapter"), str(BASE), "--base", str(BASE)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert {file.name: file.stat().st_mtime_ns for file in BASE.iterdir()} == before


def test_generate_with_and_without_the_adapter(run, script, capsys):
    generate = script("generate").main
    assert generate([PHYSICS, "--adapter", str(run[0] / "adapter")]) == 0
    assert capsys.readouterr().out == f"{PHYSICS}{next(iter(TRAINED[PHYSICS]))}\n"
    assert generate([PHYSICS, "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out == f"{PHYSICS} The first of the three\n"


def test_generate_samples_by_seed(script, capsys):
    def sampled(seed: int) -> str:
        options = ["--temperature", "1", "--top_p", "0.95", "--max_new_tokens", "12"]
        assert script("generate").main(["Once", *options, "--seed", str(seed)]) == 0
        return capsys.readouterr().out

    assert sampled(1) == sampled(1) != sampled(2)


def test_a_character_of_several_tokens_is_shown_once_it_is_whole(script):
    tokenizer = gpt2.Tokenizer()
    text = "naïve 🙂 漢字!"
    ids = tokenizer.encode(text)
    shown = list(script("generate").pieces(ids, tokenizer))
    assert "".join(shown) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in shown)
    assert shown[0] == "na", "text waits though it is whole"
    cut = list(script("generate").pieces(ids[:-4], tokenizer))
    assert "".join(cut) == tokenizer.decode(ids[:-4])


def test_ctrl_c_leaves_a_saved_adapter_and_says_so(tmp_path):
    started = subprocess.Popen(
        command("train_qa.py", "--config", DEMO, "--res_path", str(tmp_path / "cut")),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    metrics, patience = tmp_path / "cut" / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert started.poll() is None
        assert time.monotonic() < patience
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    error = started.communicate(timeout=60)[1]
    assert started.returncode == 130
    assert error.startswith("Interrupted.")
    assert error.count("\n") == 1
    adapter = tmp_path / "cut" / "adapter"
    assert str(adapter) in error
    model = gpt2.GPT2.from_pretrained("demo")
    lora.load(model, adapter)
    trained = [m for m in model.modules() if isinstance(m, lora.LowRankUpdate)]
    assert len(trained) == 8
    assert all(update.B.abs().max() > 0 for update in trained)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--no_such_option", "1"], "no_such_option"),
        (["--config", DEMO, "--lr", "fast"], "lr"),
        (["--config", DEMO, "--epochs", "0"], "epochs"),
        (["--config", DEMO, "--logging_steps", "0"], "logging_steps"),
        (["--config", DEMO, "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--config", DEMO, "--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--config", DEMO, "--model_name", "./nowhere"], "nowhere"),
        (["--config", DEMO, "--device", "abacus"], "abacus"),
        (["--config", DEMO, "--lora.r", "0"], "r must be"),
        (["--config", DEMO, "--lora.targets", "q_proj"], "c_attn"),
        (["--config", DEMO, "--generate.top_p", "2"], "top_p"),
        (["--config", DEMO, "--res_path", __file__], __file__),
        (["--config", DEMO, "--res_path", f"{__file__}/below"], __file__),
    ],
    ids=lambda value: " ".join(value[-2:])[-30:] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, script, capsys, tmp_path):
    res_path = [] if "--res_path" in arguments else ["--res_path", str(tmp_path / "never")]
    assert script("train_qa").main([*arguments, *res_path]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert said in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["generate", "merge"])
def test_a_folder_without_an_adapter_is_one_line_and_exit_code_2(name, script, capsys, tmp_path):
    arguments = {
        "generate": ["Once", "--adapter", str(tmp_path)],
        "merge": [str(tmp_path), str(tmp_path / "out")],
    }
    assert script(name).main(arguments[name]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert str(tmp_path) in error
    assert list(tmp_path.iterdir()) == []


def test_a_process_ends_with_the_exit_code():
    done = subprocess.run(command("generate.py"), capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


def test_the_articles_config_is_the_articles_run(script):
    options = script("train_qa").parse(["--config", str(SCRIPTS / "configs" / "article.yaml")])
    article = {
        "model_name": "gpt2",
        "seed": 42,
        "max_token_length": 128,
        "lr": 1e-4,
        "warmup_ratio": 0.0,
        "epochs": 500,
        "train_batch_size": 1,
        "logging_steps": 5,
    }
    assert {name: options[name] for name in article} == article
    assert {name: options.lora[name] for name in ("r", "alpha", "dropout", "targets")} == {
        "r": 8,
        "alpha": 16,
        "dropout": 0.1,
        "targets": ["c_attn"],
    }


def test_tasks_train_an_adapter_each_and_answer_in_one_batch(script, tmp_path, capsys):
    files = sorted(str(f) for f in (SCRIPTS / "data" / "tasks").glob("*.jsonl"))
    out = tmp_path / "tasks"
    arguments = ["--config", DEMO, "--epochs", "2", "--res_path", str(out), "--tasks", *files]
    assert script("train_qa").main(arguments) == 0
    assert "One batch, many adapters" in capsys.readouterr().out
    heading, _, *rows = (out / "answers.md").read_text(encoding="utf-8").splitlines()
    assert heading == "| prompt | base | science | transformers | mixture |"
    assert len(rows) == 6
    for name in ("science", "transformers"):
        model = gpt2.GPT2.from_pretrained("demo")
        assert len(lora.load(model, out / name)) == 8


def test_tasks_of_one_name_are_refused(script, tmp_path, capsys):
    file = str(SCRIPTS / "data" / "article.jsonl")
    arguments = ["--config", DEMO, "--res_path", str(tmp_path), "--tasks", file, file]
    assert script("train_qa").main(arguments) == 2
    assert "files of different names" in capsys.readouterr().err
