"""The scripts as a user runs them: a real run on the demo base, and bad input in one line."""

from __future__ import annotations

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

import gpt2
import lora

for package in ("jsonargparse", "docstring_parser", "yaml", "rich", "matplotlib"):
    pytest.importorskip(package, reason="the scripts need the extra 'scripts'")

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


@pytest.fixture
def run(demo_run):
    return demo_run


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


def test_the_adapters_card_says_what_it_was_trained_on_and_how_to_do_so_again(run):
    card = (run[0] / "adapter" / "README.md").read_text(encoding="utf-8")
    record = json.loads((run[0] / "run.json").read_text(encoding="utf-8"))
    for words in ("| data | article.jsonl |", "| seed |", "--config options.yaml |"):
        assert words in card
    assert f"| steps | {record['steps']} |" in card


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


def test_metrics_have_every_step(run, demo, tokenizer):
    lines = (run[0] / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [s["step"] for s in steps] == list(range(1, 201))
    data = gpt2.encode(gpt2.read_examples(SCRIPTS / "data" / "article.jsonl"), tokenizer)
    batch = next(gpt2.batches(data, 1, seed=42, epoch=0))
    at_birth = demo(batch.idx, batch.labels).item() / batch.n_tokens  # the base drops nothing
    assert steps[0]["loss"] == pytest.approx(at_birth, rel=1e-5)
    assert steps[0]["loss"] > 4.5 > 0.2 > steps[-1]["loss"]
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
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = transformers.GPT2LMHeadModel.from_pretrained(BASE, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, run[0] / "adapter").eval()
    idx = torch.tensor([gpt2.Tokenizer().encode(PHYSICS)])
    with torch.no_grad():
        torch.testing.assert_close(adapted(idx), theirs(idx).logits, rtol=1e-5, atol=1e-4)


def test_transformers_alone_loads_the_adapter(run, adapted):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(BASE, dtype=torch.float32).eval()
    theirs.load_adapter(str(run[0] / "adapter"))
    idx = torch.tensor([gpt2.Tokenizer().encode(PHYSICS)])
    with torch.no_grad():
        torch.testing.assert_close(adapted(idx), theirs(idx).logits, rtol=1e-5, atol=1e-4)


def test_merge_writes_what_transformers_loads(run, adapted, script, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
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
    for folder in (run[0], run[0] / "adapter"):
        assert generate([PHYSICS, "--adapter", str(folder), "--device", "cpu"]) == 0
        assert capsys.readouterr().out == f"{PHYSICS}{next(iter(TRAINED[PHYSICS]))}\n"
    assert generate([PHYSICS, "--max_new_tokens", "5", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{PHYSICS} The first of the three\n"


def test_generate_shows_the_best_of_several_beams(run, script, capsys):
    beams = ["--num_beams", "3", "--length_penalty", "0.8", "--max_new_tokens", "12"]
    folder = ["--adapter", str(run[0]), "--device", "cpu"]
    assert script("generate").main([PHYSICS, *folder, *beams]) == 0
    assert capsys.readouterr().out == f"{PHYSICS}{next(iter(TRAINED[PHYSICS]))}\n"


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
    shown = list(script("runs.answers").pieces(ids, tokenizer))
    assert "".join(shown) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in shown)
    assert shown[0] == "na", "text waits though it is whole"
    cut = list(script("runs.answers").pieces(ids[:-4], tokenizer))
    assert "".join(cut) == tokenizer.decode(ids[:-4])


def test_a_merged_model_answers_in_a_pipeline(run, script, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert script("merge").main([str(run[0]), str(tmp_path / "merged")]) == 0
    pipeline = transformers.pipeline("text-generation", str(tmp_path / "merged"), device="cpu")
    (answer,) = pipeline(PHYSICS, max_new_tokens=24, do_sample=False)
    assert answer["generated_text"].removeprefix(PHYSICS) in TRAINED[PHYSICS]


def test_ctrl_c_leaves_a_saved_adapter_and_says_so(heeded, tmp_path):
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
    assert error.startswith("Interrupted. The adapter of step ")
    assert error.count("\n") == 1
    adapter = tmp_path / "cut" / "adapter"
    assert str(adapter) in error
    assert_trained(adapter)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_saves_the_step_it_met_and_others_change_nothing(
    name, code, heeded, script, tmp_path, monkeypatch, capsys
):
    saving, save = script("runs.train"), lora.save
    recorded, kill = saving.recorded, getattr(signal, name)

    def killed(run, place):
        for step in recorded(run, place):
            yield step
            if step.step == 2:
                os.kill(os.getpid(), kill)

    def impatient(*arguments, **options):
        for other in (signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), other)
        save(*arguments, **options)

    monkeypatch.setattr(saving, "recorded", killed)
    monkeypatch.setattr(lora, "save", impatient)
    before = signal.getsignal(kill)
    out = tmp_path / "cut"
    assert script("train_qa").main([*QUICK, "--res_path", str(out)]) == code
    error = capsys.readouterr().err
    said = "Interrupted." if name == "SIGINT" else f"Stopped by {name}."
    saved = f"The adapter of step 2 is saved in {out / 'adapter'}."
    assert error == f"{said} {saved} Go on with --resume {out}.\n"
    assert_trained(out / "adapter")
    assert signal.getsignal(kill) == before


def test_a_second_ctrl_c_ends_a_script_whose_saving_hangs(heeded, tmp_path):
    hangs = tmp_path / "hangs.py"
    hangs.write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from scripts.cli.guard import guarded\n"
        "@guarded\n"
        "def main(argv):\n"
        "    try:\n"
        "        print('works', flush=True)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('saves', flush=True)\n"
        "        time.sleep(60)\n"
        "main([])\n"
    )
    started = subprocess.Popen([sys.executable, hangs], stdout=subprocess.PIPE, encoding="utf-8")
    assert started.stdout is not None
    for line in ("works\n", "saves\n"):
        assert started.stdout.readline() == line
        started.send_signal(signal.SIGINT)
    assert started.wait(20) == -signal.SIGINT


def test_debug_shows_the_traceback_before_the_line(script, capsys):
    arguments = ["nowhere", "--debug"]
    assert script("report").main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback (most recent call last):")
    assert error.splitlines()[-1].startswith("nowhere holds no run")
    assert script("report").main(arguments[:1]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_where_python_ignores_errors_ends_the_script_too(
    name, code, heeded, script, capsys
):
    class Dying:
        def __del__(self) -> None:
            os.kill(os.getpid(), getattr(signal, name))
            for _ in range(1000):  # here the signal is heeded, and what it raises is ignored
                pass

    def body(_) -> None:
        Dying()
        time.sleep(20)
        raise AssertionError("the signal was lost")

    assert script("cli.guard").guarded(body)([]) == code
    said = "Interrupted." if name == "SIGINT" else f"Stopped by {name}."
    assert capsys.readouterr().err == f"{said}\n"


def test_a_reader_that_goes_ends_training_with_a_line(tmp_path):
    options = ["--steps", "5000", "--logging_steps", "1", "--res_path", str(tmp_path / "cut")]
    started = subprocess.Popen(
        command("train_qa.py", *options, "--prompts", str(SCRIPTS / "data" / "article.jsonl")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    assert started.stdout is not None
    while not started.stdout.readline().startswith("step "):
        assert started.poll() is None
    started.stdout.close()
    assert started.wait(60) == 2
    assert started.stderr is not None
    error = started.stderr.read()
    assert error.startswith("Nobody reads the output any more. The adapter of step ")
    assert error.count("\n") == 1
    assert_trained(tmp_path / "cut" / "adapter")


def assert_trained(adapter: Path) -> None:
    model = gpt2.GPT2.from_pretrained("demo")
    lora.load(model, adapter)
    trained = [m for m in model.modules() if isinstance(m, lora.LowRankUpdate)]
    assert len(trained) == 8
    assert all(update.B.abs().max() > 0 for update in trained)


QUICK = ("--steps", "3", "--generate.max_new_tokens", "2", "--device", "cpu")


def test_a_step_that_was_not_applied_is_no_step_of_the_adapter(script, tmp_path, capsys):
    out = tmp_path / "run"
    assert script("train_qa").main([*QUICK, "--lr", "1e20", "--res_path", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Step 2: the loss is nan")
    assert f"The adapter of step 1 is saved in {out / 'adapter'}." in error
    assert_trained(out / "adapter")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_in_training_leaves_a_saved_adapter(script, tmp_path, monkeypatch, capsys):
    folder, out = script("runs.folder"), tmp_path / "run"
    prepare = folder.prepare

    def full(*arguments) -> Path:
        place = prepare(*arguments)
        (place / folder.METRICS).symlink_to("/dev/full")
        return place

    monkeypatch.setattr(folder, "prepare", full)
    assert script("train_qa").main([*QUICK, "--res_path", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("[Errno 28] No space left on device The adapter of step 1")
    assert error.count("\n") == 1
    assert f"is saved in {out / 'adapter'}." in error
    assert_trained(out / "adapter")


def test_an_adapter_that_cannot_be_saved_is_one_line(script, tmp_path, monkeypatch, capsys):
    def full(*_, **__) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(lora, "save", full)
    out = tmp_path / "run"
    assert script("train_qa").main([*QUICK, "--res_path", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "The adapter cannot be saved either: No space left on device." in error
    assert f"Go on with --resume {out}." in error


def test_a_run_is_left_alone_unless_told(run, script, tmp_path, capsys, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in run[0].rglob("*")}
    assert script("train_qa").main([*QUICK, "--res_path", str(run[0])]) == 2
    assert f"{run[0]} holds a run (adapter, metrics.jsonl" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in run[0].rglob("*")} == before
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run[0], "mine")
    Path("mine", "notes.txt").write_text("mine")
    train = script("train_qa").main
    assert train([*QUICK, "--res_path", "mine", "--overwrite"]) == 0
    assert Path("mine", "notes.txt").read_text() == "mine"
    assert len(Path("mine", "metrics.jsonl").read_text().splitlines()) == 3
    for number in (1, 2):
        assert train([*QUICK]) == 0
        assert Path("runs", f"qa-{number}", "run.json").is_file()


def test_a_path_is_no_markup(script, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = Path("[red]odd.csv")
    data.write_text("text\n[bold]markup[/nothing] of some length\n")
    odd = ["--max_token_length", "5", "--res_path", "[/b] :smile: \udcff"]
    assert script("train_qa").main([*QUICK, "--data", str(data), *odd]) == 0
    out = capsys.readouterr().out
    assert "Saved in [/b] :smile: " in out
    assert "Answers" not in out  # a text as a whole has no prompt to try
    assert "1 (100.0%) longer than 5 were cut: see --max_token_length" in out
    assert script("train_qa").main([*QUICK, "--tasks", str(data), "--res_path", "[/t]"]) == 0
    assert "[red]odd: 1 examples" in capsys.readouterr().out


def test_references_are_compared_and_no_part_of_the_prompt(script, tmp_path, capsys):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("question,answer\nWhat is it?,Nothing.\nHow do transformers work?,Well.\n")
    out = tmp_path / "run"
    arguments = ["--prompts", str(prompts), "--res_path", str(out)]
    assert script("train_qa").main([*QUICK, *arguments]) == 0
    said = capsys.readouterr().out
    assert "0 of 1 trained prompts answered word for word. 0 of 1 others answered as" in said
    answers = json.loads((out / "run.json").read_text(encoding="utf-8"))["answers"]
    assert [a["prompt"] for a in answers] == [
        "Q: What is it?\nA:",
        "Q: How do transformers work?\nA:",
    ]
    assert [a["references"] for a in answers] == [[" Nothing."], [" Well."]]
    assert [a["verdict"] for a in answers] == ["not trained; reference: differs", "differs"]


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
    options = script("train_qa").options_of(["--config", str(SCRIPTS / "configs" / "article.yaml")])
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


def test_tasks_are_all_checked_before_the_first_is_trained(script, tmp_path, capsys):
    good, bad = tmp_path / "good.jsonl", tmp_path / "a.bad.name.jsonl"
    for file in (good, bad):
        file.write_text('{"text": "a b c"}')
    out = tmp_path / "out"
    train = script("train_qa").main
    assert train([*QUICK, "--res_path", str(out), "--tasks", str(good), str(bad)]) == 2
    printed, error = capsys.readouterr()
    assert (printed, error.count("\n")) == ("", 1)
    assert "'a.bad.name'" in error
    assert not out.exists()
    assert train([*QUICK, "--res_path", str(out), "--tasks", str(good)]) == 0
    made = ["good", "options.yaml", "report.html", "run.json"]
    assert sorted(p.name for p in out.iterdir()) == made
    capsys.readouterr()
    assert train([*QUICK, "--res_path", str(out), "--tasks", str(good)]) == 2
    assert "holds a run (good, run.json, report.html)" in capsys.readouterr().err


def test_tasks_train_each_adapter_as_alone(script, tmp_path):
    files = [str(f) for f in sorted((SCRIPTS / "data" / "tasks").glob("*.jsonl"))]
    train = script("train_qa").main
    assert train([*QUICK, "--res_path", str(tmp_path / "both"), "--tasks", *files]) == 0
    for file in files:
        alone, name = tmp_path / f"alone-{Path(file).stem}", Path(file).stem
        assert train([*QUICK, "--res_path", str(alone), "--tasks", file]) == 0
        weights = [(p / name / "adapter_model.safetensors") for p in (tmp_path / "both", alone)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_tasks_take_no_beams_and_say_so_before_they_train(script, tmp_path, capsys):
    file = str(SCRIPTS / "data" / "article.jsonl")
    beams = ["--generate.num_beams", "2", "--res_path", str(tmp_path / "out")]
    assert script("train_qa").main([*QUICK, *beams, "--tasks", file]) == 2
    assert "generate.num_beams must be 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_bases_dropouts_are_its_own_or_what_is_asked_for(script, tmp_path):
    """The demo base states none; with some the same run takes other steps."""
    losses = {}
    for name, asked in {"own": [], "none": ["0"], "some": ["0.1"]}.items():
        arguments = [*QUICK, "--lora.dropout", "0", "--res_path", str(tmp_path / name)]
        arguments += ["--base_dropout", *asked] if asked else []
        assert script("train_qa").main(arguments) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    assert losses["own"] == losses["none"] != losses["some"]


def test_a_separator_is_between_prompt_and_completion_wherever_prompts_are_read(
    script, tmp_path, capsys, monkeypatch
):
    asked: list[list[int]] = []
    real = gpt2.generate
    monkeypatch.setattr(
        gpt2, "generate", lambda model, ids, config: asked.extend(ids) or real(model, ids, config)
    )
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text('{"prompt": "a b", "completion": " c"}\n')
    ids = [*gpt2.Tokenizer().encode("a b"), 50256]
    separator = ["--separator", "50256"]
    train = [*QUICK, "--data", str(data), "--res_path", str(out), *separator]
    assert script("train_qa").main(train) == 0
    assert json.loads((out / "run.json").read_text())["data"]["tokens"] == len(ids) + 2
    short = [*separator, "--max_new_tokens", "2", "--device", "cpu"]
    assert script("predict").main([str(data), "--adapter", str(out), *short]) == 0
    assert script("generate").main(["a b", *short, "--num_beams", "2"]) == 0
    assert asked == [ids] * len(asked)
    assert len(asked) >= 4


def test_the_e2e_config_is_read_as_the_benchmark_reads_it(script):
    options = script("train_qa").options_of(["--config", str(SCRIPTS / "configs" / "e2e.yaml")])
    assert (options.base_dropout, options.answer_only, options.eos) == (0.0, True, True)
    assert options.lora["targets"] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    beams = {"num_beams": 10, "length_penalty": 0.8, "no_repeat_ngram": 4}  # the paper's
    assert {name: options.generate[name] for name in beams} == beams
    steps = 2 * -(-42_061 // 8)  # the task's examples
    by_steps, by_share = (
        gpt2.TrainConfig(lr=options.lr, epochs=2, **{name: value})
        for name, value in (("warmup_steps", options.warmup_steps), ("warmup_ratio", 0.015))
    )
    for step in range(1, steps + 1, 7):
        assert gpt2.learning_rate(step, steps, by_steps) == gpt2.learning_rate(
            step, steps, by_share
        )
    assert options.label_smoothing == 0.0
    given = ["--config", str(SCRIPTS / "configs" / "e2e.yaml"), "--warmup_ratio", "0.5"]
    assert script("train_qa").options_of(given).warmup_steps is None  # which would win


def test_tasks_of_one_name_are_refused(script, tmp_path, capsys):
    file = str(SCRIPTS / "data" / "article.jsonl")
    arguments = ["--config", DEMO, "--res_path", str(tmp_path), "--tasks", file, file]
    assert script("train_qa").main(arguments) == 2
    assert "needs different names" in capsys.readouterr().err
