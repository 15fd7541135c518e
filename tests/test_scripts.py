"""The scripts as a user runs them: a real run on the demo base, and bad input in one line."""

from __future__ import annotations

import contextlib
import importlib
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
from gpt2.training.config import lr_scale
from tests.script_runs import (
    ROOT,
    SCRIPTS,
    assert_trained,
    command,
    losses_of,
    record_of,
    rows,
    stopped_after,
    times_of,
    write_rows,
)

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


@pytest.fixture
def run(demo_run) -> Path:
    return demo_run[0]


@pytest.fixture
def record(run) -> dict:
    return record_of(run)


@pytest.fixture
def adapted(run):
    """The demo base with the run's adapter."""
    model = gpt2.GPT2.from_pretrained("demo")
    lora.load(model, run / "adapter")
    return model


def test_trained_questions_are_answered_word_for_word_and_the_base_answers_none(record):
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


def test_answers_are_those_of_the_saved_adapter(record, adapted):
    tokenizer, answers = gpt2.Tokenizer(), record["answers"]
    ids = [tokenizer.encode(answer["prompt"]) for answer in answers]
    for name, context in (("tuned", contextlib.nullcontext()), ("base", lora.disabled(adapted))):
        with context:
            made = gpt2.generate(adapted, ids, gpt2.GenerateConfig(max_new_tokens=24))
        assert [tokenizer.decode(row) for row in made] == [answer[name] for answer in answers]


def test_output_is_readable_when_it_is_not_a_terminal(demo_run):
    folder, out = demo_run
    for odd in ("\x1b", "\r", "…"):  # the last where a cell was cut
        assert odd not in out
    for count in ("19,446,528", "65,536", "0.3359"):
        assert count in out
    steps = [line for line in out.splitlines() if line.startswith("step ")]
    assert len(steps) == 20
    assert "loss" in steps[-1]
    assert "tokens/s" in steps[-1]
    assert "3 of 3 trained prompts answered word for word." in out
    (saved,) = (line for line in out.splitlines() if line.startswith(f"Saved in {folder}: "))
    for file in ("adapter", "metrics.jsonl", "loss.png", "answers.md", "run.json"):
        assert file in saved.rpartition(folder.name)[2]


def test_metrics_have_every_step(run, demo, tokenizer):
    steps = rows(run / "metrics.jsonl")
    assert [s["step"] for s in steps] == list(range(1, 201))
    data = gpt2.encode(gpt2.read_examples(SCRIPTS / "data" / "article.jsonl"), tokenizer)
    batch = next(gpt2.batches(data, 1, seed=42, epoch=0))
    at_birth = demo(batch.idx, batch.labels).item() / batch.n_tokens  # the base drops nothing
    assert steps[0]["loss"] == pytest.approx(at_birth, rel=1e-5)
    assert steps[0]["loss"] > 4.5 > 0.2 > steps[-1]["loss"]
    assert steps[0]["lr"] == pytest.approx(3e-3, rel=0.01)
    assert all(s["tokens"] > 0 and s["seconds"] > 0 and s["grad_norm"] > 0 for s in steps)


def test_answers_plot_record_and_card_tell_the_whole_run(run, record):
    text = (run / "answers.md").read_text(encoding="utf-8")
    assert text.startswith("3 of 3 trained prompts answered word for word.\n")
    head, _, *lines = text.splitlines()[2:]
    assert len(lines) == 6
    assert all(line.count(" | ") == 3 for line in (head, *lines))
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert record["config"]["seed"] == 42
    assert record["config"]["lora"]["dropout"] == 0.1
    assert record["versions"]["torch"] == torch.__version__
    assert record["parameters"]["LoRA"] == {"trainable": 65536, "total": 19512064}
    assert (record["data"]["examples"], record["data"]["truncated"]) == (5, 0)
    assert set(record["seconds"]) == {"load", "base answers", "training", "tuned answers"}
    card = (run / "adapter" / "README.md").read_text(encoding="utf-8")
    assert record["steps"] == 200
    for words in ("data | article.jsonl", "seed | 42", "steps | 200", "--config options.yaml"):
        assert f"{words} |" in card


def test_peft_loads_the_adapter_with_equal_logits(run, adapted):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = transformers.GPT2LMHeadModel.from_pretrained(BASE, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, run / "adapter").eval()
    idx = torch.tensor([gpt2.Tokenizer().encode(PHYSICS)])
    with torch.no_grad():
        torch.testing.assert_close(adapted(idx), theirs(idx).logits, rtol=1e-5, atol=1e-4)


def test_transformers_alone_loads_the_adapter(run, adapted):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(BASE, dtype=torch.float32).eval()
    theirs.load_adapter(str(run / "adapter"))
    idx = torch.tensor([gpt2.Tokenizer().encode(PHYSICS)])
    with torch.no_grad():
        torch.testing.assert_close(adapted(idx), theirs(idx).logits, rtol=1e-5, atol=1e-4)


@pytest.fixture(scope="module")
def merged(demo_run, tmp_path_factory) -> Path:
    """The run's model, merged."""
    out = tmp_path_factory.mktemp("merged") / "model"
    assert importlib.import_module("scripts.merge").main([str(demo_run[0]), str(out)]) == 0
    return out


def test_merge_writes_what_transformers_loads_and_overwrites_nothing(
    run, merged, adapted, script, capsys
):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(merged)
    idx = torch.tensor([gpt2.Tokenizer().encode(PHYSICS)])
    with torch.no_grad(), lora.merged(adapted):
        torch.testing.assert_close(adapted(idx), theirs(idx).logits, rtol=1e-5, atol=1e-4)
    before = times_of(merged)
    assert script("merge").main([str(run / "adapter"), str(merged)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert times_of(merged) == before


def test_a_merged_model_answers_in_a_pipeline(merged):
    transformers = pytest.importorskip("transformers")
    pipeline = transformers.pipeline("text-generation", str(merged), device="cpu")
    (answer,) = pipeline(PHYSICS, max_new_tokens=24, do_sample=False)
    assert answer["generated_text"].removeprefix(PHYSICS) in TRAINED[PHYSICS]


def test_generate_with_and_without_the_adapter_and_with_several_beams(run, script, capsys):
    beams = ["--num_beams", "3", "--length_penalty", "0.8", "--max_new_tokens", "12"]
    (trained,) = TRAINED[PHYSICS]
    for arguments, said in (
        (["--adapter", str(run)], trained),
        (["--adapter", str(run / "adapter")], trained),
        (["--adapter", str(run), *beams], trained),
        (["--max_new_tokens", "5"], " The first of the three"),
    ):
        assert script("generate").main([PHYSICS, "--device", "cpu", *arguments]) == 0
        assert capsys.readouterr().out == f"{PHYSICS}{said}\n"


def test_generate_samples_by_seed(script, small_base, capsys):
    def sampled(seed: int) -> str:
        options = ["--temperature", "1", "--top_p", "0.95", "--max_new_tokens", "12"]
        arguments = ["Once", "--base", small_base, *options, "--seed", str(seed)]
        assert script("generate").main(arguments) == 0
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


def test_ctrl_c_leaves_a_saved_adapter_and_says_so(heeded, quick, small_base, tmp_path):
    arguments = [*quick, "--steps", "5000", "--res_path", str(tmp_path / "cut")]
    started = subprocess.Popen(
        command("train_qa.py", *arguments),
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
    assert str(tmp_path / "cut" / "adapter") in error
    assert_trained(tmp_path / "cut" / "adapter", small_base)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_saves_the_step_it_met_and_others_change_nothing(
    name, code, heeded, script, quick, small_base, tmp_path, monkeypatch, capsys
):
    save, kill = lora.save, getattr(signal, name)

    def impatient(*arguments, **options):
        for other in (signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), other)
        save(*arguments, **options)

    stopped_after(2, script("runs.train"), monkeypatch, kill)
    monkeypatch.setattr(lora, "save", impatient)
    before = signal.getsignal(kill)
    out = tmp_path / "cut"
    assert script("train_qa").main([*quick, "--res_path", str(out)]) == code
    error = capsys.readouterr().err
    said = "Interrupted." if name == "SIGINT" else f"Stopped by {name}."
    saved = f"The adapter of step 2 is saved in {out / 'adapter'}."
    assert error == f"{said} {saved} Go on with --resume {out}.\n"
    assert_trained(out / "adapter", small_base)
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
def test_a_signal_where_python_ignores_errors_ends_the_script_too(name, code, heeded):
    body = f"""
import os, signal, time
from scripts.cli.guard import guarded

class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        for _ in range(1000):  # here the signal is heeded, and what it raises is ignored
            pass

def body(_):
    Dying()
    time.sleep(20)

guarded(body)([])
"""
    done = subprocess.run(
        [sys.executable, "-c", body], cwd=SCRIPTS.parent, capture_output=True, text=True
    )
    said = "Interrupted." if name == "SIGINT" else f"Stopped by {name}."
    assert (done.returncode, done.stderr) == (code, f"{said}\n")


def test_a_reader_that_goes_ends_training_with_a_line(quick, small_base, tmp_path):
    options = ["--steps", "5000", "--logging_steps", "1", "--res_path", str(tmp_path / "cut")]
    started = subprocess.Popen(
        command("train_qa.py", *quick, *options),
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
    assert_trained(tmp_path / "cut" / "adapter", small_base)


def full(*_, **__) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fault", ["a loss", "the metrics", "the adapter"])
def test_what_ends_a_training_is_one_line_and_its_adapter_is_saved(
    fault, script, quick, small_base, tmp_path, monkeypatch, capsys
):
    """A step that was not applied is no step of the adapter; a disk may be full."""
    if fault == "the metrics" and not Path("/dev/full").exists():
        pytest.skip("needs a disk that is always full")
    folder, out = script("runs.folder"), tmp_path / "run"
    prepare = folder.prepare

    def prepared(*arguments) -> Path:
        place = prepare(*arguments)
        (place / folder.METRICS).symlink_to("/dev/full")
        return place

    if fault == "the metrics":
        monkeypatch.setattr(folder, "prepare", prepared)
    if fault == "the adapter":
        monkeypatch.setattr(lora, "save", full)
    rate = ["--lr", "1e20" if fault == "a loss" else "0.01"]
    assert script("train_qa").main([*quick, *rate, "--res_path", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    said = "Step 2: the loss or" if fault == "a loss" else "[Errno 28] No space left on device"
    assert error.startswith(said)
    assert (f" Go on with --resume {out}." in error) == (fault != "a loss")
    if fault == "the adapter":
        assert f"The adapter cannot be saved either: {said}." in error
    else:
        assert f"The adapter of step 1 is saved in {out / 'adapter'}." in error
        assert_trained(out / "adapter", small_base)


def test_a_run_is_left_alone_unless_told(run, script, quick, tmp_path, capsys, monkeypatch):
    before, train = times_of(run), script("train_qa").main
    assert train([*quick, "--res_path", str(run)]) == 2
    assert f"{run} holds a run (adapter, metrics.jsonl" in capsys.readouterr().err
    assert times_of(run) == before
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "mine")
    Path("mine", "notes.txt").write_text("mine")
    assert train([*quick, "--res_path", "mine", "--overwrite"]) == 0
    assert Path("mine", "notes.txt").read_text() == "mine"
    assert len(rows(Path("mine", "metrics.jsonl"))) == 3
    for number in (1, 2):
        assert train([*quick]) == 0
        assert Path("runs", f"qa-{number}", "run.json").is_file()


def test_a_path_is_no_markup(script, quick, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = Path("[red]odd.csv")
    data.write_text("text\n[bold]markup[/nothing] of some length\n")
    odd = ["--max_token_length", "5", "--res_path", "[/b] :smile: \udcff"]
    assert script("train_qa").main([*quick, "--data", str(data), *odd]) == 0
    out = capsys.readouterr().out
    assert "Saved in [/b] :smile: " in out
    assert "Answers" not in out  # a text as a whole has no prompt to try
    assert "1 (100.0%) longer than 5 were cut: see --max_token_length" in out
    assert script("train_qa").main([*quick, "--tasks", str(data), "--res_path", "[/t]"]) == 0
    assert "[red]odd: 1 examples" in capsys.readouterr().out


def test_references_are_compared_and_no_part_of_the_prompt(script, quick, tmp_path, capsys):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("question,answer\nWhat is it?,Nothing.\nHow do transformers work?,Well.\n")
    out = tmp_path / "run"
    assert script("train_qa").main([*quick, "--prompts", str(prompts), "--res_path", str(out)]) == 0
    said = capsys.readouterr().out
    assert "0 of 1 trained prompts answered word for word. 0 of 1 others answered as" in said
    assert [(a["prompt"], a["references"], a["verdict"]) for a in record_of(out)["answers"]] == [
        ("Q: What is it?\nA:", [" Nothing."], "not trained; reference: differs"),
        ("Q: How do transformers work?\nA:", [" Well."], "differs"),
    ]


def test_answers_are_judged_by_those_that_were_trained_or_else_by_references(script):
    cases = [  # trained, references, answer, its length of at most 2
        ([" a"], [], " a", 1, "exact"),
        ([" a"], [], " a", 2, "exact, cut off"),
        ([" a"], [" b"], " a b", 2, "exact, then goes on"),
        ([" a"], [" b"], " b", 1, "differs"),
        ([], [" b"], " b", 1, "not trained; reference: exact"),
        ([], [], " b", 1, "not trained"),
    ]
    answers = [{"trained": t, "references": r, "tuned": said} for t, r, said, _, _ in cases]
    ids = [[[0] * length] for *_, length, _ in cases]
    script("runs.answers").judge(answers, ids, gpt2.GenerateConfig(max_new_tokens=2), whole=True)
    assert [answer["verdict"] for answer in answers] == [verdict for *_, verdict in cases]


def test_the_bases_dropouts_and_the_rate_of_b_are_what_is_asked_for(script, quick, tmp_path):
    """The small base states a dropout of 0.1."""
    losses = {}
    for asked in ("", "--base_dropout 0", "--base_dropout 0.1", "--b_ratio 16"):
        out = tmp_path / f"run{asked}"
        arguments = [*quick, "--lora.dropout", "0", "--res_path", str(out), *asked.split()]
        assert script("train_qa").main(arguments) == 0
        losses[asked] = losses_of(out)
    same, none, some, faster = losses.values()
    assert same == some != none
    assert same[0] == faster[0]
    assert same[2] > faster[2]


def test_a_separator_is_between_prompt_and_completion_wherever_prompts_are_read(
    script, quick, small_base, tmp_path, monkeypatch
):
    asked: list[list[int]] = []
    real = gpt2.generate
    monkeypatch.setattr(
        gpt2, "generate", lambda model, ids, config: asked.extend(ids) or real(model, ids, config)
    )
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    write_rows(data, [{"prompt": "a b", "completion": " c"}])
    ids = [*gpt2.Tokenizer().encode("a b"), 50256]
    separator = ["--separator", "50256"]
    train = [*quick, "--data", str(data), "--res_path", str(out), *separator]
    assert script("train_qa").main(train) == 0
    assert record_of(out)["data"]["tokens"] == len(ids) + 2
    short = [*separator, "--max_new_tokens", "2", "--device", "cpu", "--base", small_base]
    assert script("predict").main([str(data), "--adapter", str(out), *short]) == 0
    assert script("generate").main(["a b", *short, "--num_beams", "2"]) == 0
    assert asked == [ids] * len(asked)
    assert len(asked) >= 4


# The configs.


def test_the_articles_config_is_the_articles_run(script):
    options = script("train_qa").options_of(["--config", str(SCRIPTS / "configs" / "article.yaml")])
    article = {"model_name": "gpt2", "seed": 42, "max_token_length": 128, "lr": 1e-4}
    article |= {"warmup_ratio": 0.0, "epochs": 500, "train_batch_size": 1, "logging_steps": 5}
    assert {name: options[name] for name in article} == article
    adapter = {"r": 8, "alpha": 16, "dropout": 0.1, "targets": ["c_attn"]}
    assert {name: options.lora[name] for name in adapter} == adapter


def test_the_e2e_config_is_read_as_the_benchmark_reads_it(script):
    config = ["--config", str(SCRIPTS / "configs" / "e2e.yaml")]
    options = script("train_qa").options_of(config)
    assert (options.base_dropout, options.answer_only, options.eos) == (0.0, True, True)
    assert options.lora["targets"] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    beams = {"num_beams": 10, "length_penalty": 0.8, "no_repeat_ngram": 4}  # the paper's
    assert {name: options.generate[name] for name in beams} == beams
    assert options.label_smoothing == 0.0
    total = 2 * -(-42_061 // 8)  # the task's examples
    warmups = ({"warmup_steps": options.warmup_steps}, {"warmup_ratio": 0.015})
    steps, share = (gpt2.TrainConfig(lr=options.lr, epochs=2, **how) for how in warmups)
    for step in range(1, total + 1, 7):
        assert lr_scale(step, total, steps) == lr_scale(step, total, share)
    given = script("train_qa").options_of([*config, "--warmup_ratio", "0.5"])
    assert given.warmup_steps is None  # which would win
