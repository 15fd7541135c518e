"""`train_qa.py` with validation, snapshots and going on, as a user runs it."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

import gpt2
import lora
from tests.script_runs import QUICK, SCRIPTS, assert_trained, command

ARTICLE = str(SCRIPTS / "data" / "article.jsonl")
MANY = [f'{{"prompt": "Q{i}:", "completion": " answer {i}"}}' for i in range(12)]
VALID = ["--validation", "0.4", "--eval_every", "2", "--train_batch_size", "2"]


@pytest.fixture
def many(tmp_path) -> str:
    file = tmp_path / "many.jsonl"
    file.write_text("\n".join([*MANY, MANY[0]]))
    return str(file)


def losses_of(folder: Path) -> list[float]:
    return [
        json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def files_of(folder: Path, *names: str) -> list[bytes]:
    return [(folder / name / "adapter_model.safetensors").read_bytes() for name in names]


def test_validation_is_in_lines_table_metrics_plot_and_record(script, tmp_path, capsys, many):
    out = tmp_path / "run"
    arguments = [*QUICK, "--steps", "5", *VALID, "--data", many, "--res_path", str(out)]
    assert script("train_qa").main(arguments) == 0
    said = capsys.readouterr().out
    assert "examples, by their prompts." in said
    lines = [line for line in said.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines if "validation" in line] == ["0", "2", "4", "5"]
    assert "Validation" in said
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    losses = record["validation"]["losses"]
    assert list(losses) == ["0", "2", "4", "5"]
    assert str(record["validation"]["best_step"]) == min(losses, key=losses.get)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {str(m["step"]): m["validation"] for m in metrics if "validation" in m} == {
        step: loss for step, loss in losses.items() if step != "0"
    }
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["adapter", "last"]
    assert not list(out.glob("*snapshot*"))  # the run is over


def test_patience_ends_a_run_early(script, tmp_path, capsys, many, monkeypatch):
    fitting = importlib.import_module("gpt2.training.fitting")
    worse = iter(range(1, 100))
    fake = lambda *_, **__: gpt2.Evaluation(loss=float(next(worse)), tokens=1, examples=1)  # noqa: E731
    monkeypatch.setattr(fitting, "evaluate", fake)
    out = tmp_path / "run"
    arguments = [*QUICK, "--steps", "30", *VALID, "--patience", "2", "--data", many]
    assert script("train_qa").main([*arguments, "--res_path", str(out)]) == 0
    assert "Stopped after step 4: the validation loss fell no more." in capsys.readouterr().out
    assert len(losses_of(out)) == 4
    model = gpt2.GPT2.from_pretrained("demo")
    lora.load(model, out / "adapter")  # of step 0, which nothing was better than
    updates = [m for m in model.modules() if isinstance(m, lora.LowRankUpdate)]
    assert all(update.B.abs().max() == 0 for update in updates)
    assert_trained(out / "last")


def stopped_after(step: int, saving, monkeypatch, number: int = signal.SIGTERM) -> None:
    recorded = saving.recorded

    def killed(run, place):
        for record in recorded(run, place):
            yield record
            if record.step == step:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(saving, "recorded", killed)


def test_a_run_that_is_stopped_and_gone_on_with_is_as_one_that_never_stopped(
    script, tmp_path, capsys, many, monkeypatch
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = [*QUICK, "--steps", "7", *VALID, "--data", many, "--res_path"]
    train, saving = script("train_qa").main, script("runs.train")
    assert train([*arguments, str(whole)]) == 0
    capsys.readouterr()
    for i, step in enumerate((3, 5)):
        with monkeypatch.context() as patch:
            stopped_after(step, saving, patch)
            assert train(["--resume", str(cut)] if i else [*arguments, str(cut)]) == 143
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith("Stopped by SIGTERM. The best adapter, of step ")
        assert f"the last, of step {step}, in {cut / 'last'}." in error
        assert error.endswith(f" Go on with --resume {cut}.\n")
    assert train(["--resume", str(cut)]) == 0
    assert losses_of(cut) == losses_of(whole)
    assert files_of(cut, "adapter", "last") == files_of(whole, "adapter", "last")
    one, other = (json.loads((p / "run.json").read_text()) for p in (whole, cut))
    assert one["validation"] == other["validation"]
    assert one["answers"] == other["answers"]
    assert train(["--resume", str(cut)]) == 2
    assert "or the run has ended" in capsys.readouterr().err


def test_what_cannot_be_gone_on_with_is_one_line(script, tmp_path, capsys, many, monkeypatch):
    train, out = script("train_qa").main, tmp_path / "run"
    empty = tmp_path / "empty"
    empty.mkdir()

    def refused(*arguments: str) -> str:
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
        assert train([*arguments]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
        return said

    assert f"{empty} has nothing to resume" in refused("--resume", str(empty))
    assert "--resume FOLDER" in refused("--resume")
    with monkeypatch.context() as patch:
        stopped_after(2, script("runs.train"), patch)
        arguments = [*QUICK, "--steps", "7", *VALID, "--data", many, "--res_path", str(out)]
        assert train(arguments) == 143
    capsys.readouterr()
    assert "lr was 0.003, is 0.1" in refused("--resume", str(out), "--lr", "0.1")
    assert "data was" in refused("--resume", str(out), "--data", ARTICLE)
    assert "lora was {" in refused("--resume", str(out), "--lora.alpha", "3")
    assert "or pass --resume or --overwrite true" in refused(*arguments)
    with script("runs.folder").locked(out):
        assert f"Another run works in {out}" in refused("--resume", str(out))
        assert f"Another run works in {out}" in refused(*arguments, "--overwrite")
    assert train(["--resume", str(out)]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--validation", "2"], "A share must be above 0 and below 1"),
        (["--validation", "1e-9"], "leaves none to evaluate on"),
        (["--validation", ARTICLE], "Every validation example has a prompt that is learnt too"),
        (["--validation", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--patience", "2"], "patience and eval_every need validation data"),
        (["--patience", "0", "--validation", "0.5"], "patience must be an integer of at least 1"),
        (["--save_every", "soon"], "save_every must be steps"),
        (["--tasks", ARTICLE, "--validation", "0.5", "--resume"], "has nothing to resume"),
    ],
    ids=lambda value: " ".join(value)[-30:] if isinstance(value, list) else "",
)
def test_bad_validation_is_one_line(arguments, said, script, capsys, tmp_path):
    assert script("train_qa").main([*QUICK, *arguments, "--res_path", str(tmp_path / "never")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert list(tmp_path.iterdir()) == []


def test_validation_that_overlaps_training_is_left_out_and_said(script, tmp_path, capsys, many):
    file = tmp_path / "valid.jsonl"
    file.write_text("\n".join([MANY[3], '{"prompt": "Q99:", "completion": " x"}']))
    arguments = [*QUICK, "--data", many, "--validation", str(file), "--eval_every", "2"]
    assert script("train_qa").main([*arguments, "--res_path", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "Validation: 1 examples." in said
    assert "1 others share a prompt with the training data: left out." in said


def test_one_run_at_a_time_in_a_folder(script, tmp_path):
    folder = script("runs.folder")
    with folder.locked(tmp_path):
        done = subprocess.run(
            command("train_qa.py", *QUICK, "--res_path", str(tmp_path)),
            capture_output=True,
            encoding="utf-8",
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"Another run works in {tmp_path}: ")
    with folder.locked(tmp_path):
        pass


@pytest.mark.parametrize("name", ["generate", "predict", "merge"])
def test_a_run_that_was_killed_before_it_kept_an_adapter_says_how_to_go_on(
    name, script, tmp_path, capsys
):
    place = tmp_path / "killed"
    place.mkdir()
    (place / "options.yaml").write_text("seed: 1\n")
    (tmp_path / "ask.txt").write_text("Q:\n")
    given = {
        "generate": ["Q:", "--adapter", str(place)],
        "predict": [str(tmp_path / "ask.txt"), "--adapter", str(place)],
        "merge": [str(place), str(tmp_path / "out")],
    }
    assert script(name).main(given[name]) == 2
    told = f"{place} has no adapter yet: go on with --resume {place}.\n"
    assert capsys.readouterr().err == told
    assert not (tmp_path / "out").exists()


# What was wrong once


@pytest.mark.parametrize("metrics", ["torn", "short", "long", "none"])
def test_the_metrics_of_a_killed_run_decide_nothing(
    metrics, script, tmp_path, capsys, many, monkeypatch
):
    """They are not flushed as the snapshot is, and a power cut leaves any part of them."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = [*QUICK, "--steps", "7", "--logging_steps", "2", "--data", many, "--res_path"]
    train = script("train_qa").main
    assert train([*arguments, str(whole)]) == 0
    with monkeypatch.context() as patch:
        stopped_after(5, script("runs.train"), patch)
        assert train([*arguments, str(cut)]) == 143
    file = cut / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    later = lines[-1].replace('"step": 4', '"step": 6')
    texts = {"torn": [*lines[:3], lines[3][:-9]], "short": lines[:2], "long": [*lines, later]}
    file.write_text("".join(texts.get(metrics, [])))
    capsys.readouterr()
    assert train(["--resume", str(cut)]) == 0
    said = capsys.readouterr().out
    assert "fell no more" not in said
    assert "step     7 · loss" in said
    one, other = (json.loads((place / "run.json").read_text()) for place in (whole, cut))
    assert one["steps"] == other["steps"] == 7
    assert one["answers"] == other["answers"]
    assert files_of(cut, "adapter") == files_of(whole, "adapter")
    steps = [json.loads(line)["step"] for line in file.read_text().splitlines()]
    assert steps == sorted({*steps})
    assert steps[-2:] == [6, 7]


def test_options_that_resume_would_drop_are_refused(script, tmp_path, capsys, many, monkeypatch):
    train, cut = script("train_qa").main, tmp_path / "cut"
    arguments = [*QUICK, "--steps", "7", "--data", many, "--res_path", str(cut)]
    with monkeypatch.context() as patch:
        stopped_after(2, script("runs.train"), patch)
        assert train(arguments) == 143
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    capsys.readouterr()
    for more, said in (
        (["--res_path", str(tmp_path / "other")], f"--res_path names {tmp_path / 'other'}: give"),
        (["--overwrite"], "--resume and --overwrite exclude each other: give one."),
    ):
        assert train(["--resume", str(cut), *more]) == 2
        assert said in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_file_called_as_a_searchs_winner_names_no_search(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("best.jsonl").write_text("\n".join(MANY))
    assert script("train_qa").main([*QUICK, "--tasks", "best.jsonl"]) == 0
    assert [place.name for place in Path("runs").iterdir()] == ["qa-1"]


def test_bundled_data_is_asked_its_own_prompts(script):
    """But for the article's, whose prompts lie beside it."""
    data, train = script("runs.data"), script("train_qa")
    for name, first in (("weather", "Q: Tunis"), ("article", "Q: How do transformers work?")):
        options = train.options_of(["--data", str(data.DATA / f"{name}.jsonl")])
        prompts = data.prompts_of(data.read(options), options)
        assert prompts[0].text.startswith(first)
