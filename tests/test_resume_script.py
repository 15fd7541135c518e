"""`train_qa.py` with validation, snapshots and resuming, as a user runs it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import gpt2
import lora
from tests.script_runs import (
    ARTICLE,
    MANY,
    QUICK,
    SCRIPTS,
    VALID,
    assert_trained,
    losses_of,
    record_of,
    rows,
    stopped_after,
    times_of,
    weights_of,
)

SEVEN = ["--steps", "7", "--logging_steps", "2", *VALID]


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("data") / "many.jsonl"
    file.write_text("\n".join([*MANY, MANY[0]]))
    return str(file)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_base, many) -> Path:
    """The folder of a run of seven steps that never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train = importlib.import_module("scripts.train_qa").main
    arguments = [*QUICK, "--model_name", small_base, *SEVEN, "--data", many]
    assert train([*arguments, "--res_path", str(folder)]) == 0
    return folder


@pytest.fixture
def cut(script, quick, many, tmp_path):
    """A function that stops the same run after a step, or resumes it and stops it then."""
    folder = tmp_path / "cut"

    def stop(step: int) -> Path:
        arguments = [*quick, *SEVEN, "--data", many, "--res_path", str(folder)]
        with pytest.MonkeyPatch.context() as patch:
            stopped_after(step, script("runs.train"), patch)
            begun = ["--resume", str(folder)] if folder.exists() else arguments
            assert script("train_qa").main(begun) == 143
        return folder

    return stop


def test_validation_is_in_lines_table_metrics_plot_and_record(
    script, quick, tmp_path, capsys, many
):
    out = tmp_path / "run"
    arguments = [*quick, "--steps", "5", *VALID, "--data", many, "--res_path", str(out)]
    assert script("train_qa").main(arguments) == 0
    said, record = capsys.readouterr().out, record_of(out)
    held_out = int(said.partition(" examples, by their prompts.")[0].rpartition(" ")[2])
    assert record["data"]["examples"] == len(MANY) + 1 - held_out
    lines = [line for line in said.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines if "validation" in line] == ["0", "2", "4", "5"]
    assert "Validation: loss first " in said
    losses = record["validation"]["losses"]
    assert list(losses) == ["0", "2", "4", "5"]
    assert str(record["validation"]["best_step"]) == min(losses, key=losses.get)
    metrics = rows(out / "metrics.jsonl")
    kept = {str(m["step"]): m["validation"] for m in metrics if "validation" in m}
    assert {"0": losses["0"], **kept} == losses
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["adapter", "last"]
    assert not list(out.glob("*snapshot*"))  # the run is over


def test_patience_ends_a_run_early(script, quick, small_base, tmp_path, capsys, many, monkeypatch):
    fitting = importlib.import_module("gpt2.training.fitting")
    worse = iter(range(1, 100))
    fake = lambda *_, **__: gpt2.Evaluation(loss=float(next(worse)), tokens=1, examples=1)  # noqa: E731
    monkeypatch.setattr(fitting, "evaluate", fake)
    out = tmp_path / "run"
    arguments = [*quick, "--steps", "30", *VALID, "--patience", "2", "--data", many]
    assert script("train_qa").main([*arguments, "--res_path", str(out)]) == 0
    assert "Stopped after step 4: the validation loss fell no more." in capsys.readouterr().out
    assert len(losses_of(out)) == 4
    model = gpt2.GPT2.from_pretrained(small_base)
    lora.load(model, out / "adapter")  # of step 0, which nothing was better than
    updates = [m for m in model.modules() if isinstance(m, lora.LowRankUpdate)]
    assert all(update.B.abs().max() == 0 for update in updates)
    assert_trained(out / "last", small_base)


def test_a_run_that_is_stopped_and_resumed_is_as_one_that_never_stopped(script, whole, cut, capsys):
    for step in (3, 5):
        folder = cut(step)
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith("Stopped by SIGTERM. The best adapter, of step ")
        assert f"the last, of step {step}, in {folder / 'last'}." in error
        assert error.endswith(f" Go on with --resume {folder}.\n")
    assert script("train_qa").main(["--resume", str(folder)]) == 0
    assert losses_of(folder) == losses_of(whole)
    assert weights_of(folder, "adapter", "last") == weights_of(whole, "adapter", "last")
    one, other = record_of(whole), record_of(folder)
    assert one["validation"] == other["validation"]
    assert one["answers"] == other["answers"]
    assert script("train_qa").main(["--resume", str(folder)]) == 2
    assert "or the run has ended" in capsys.readouterr().err


def test_what_cannot_be_resumed_is_one_line(script, quick, tmp_path, capsys, many, cut):
    train, out, empty = script("train_qa").main, cut(2), tmp_path / "empty"
    arguments = [*quick, *SEVEN, "--data", many, "--res_path", str(out)]
    empty.mkdir()
    capsys.readouterr()

    def refused(*arguments: str) -> str:
        before = times_of(tmp_path)
        assert train([*arguments]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert times_of(tmp_path) == before
        return said

    resume = ("--resume", str(out))
    assert f"{empty} has nothing to resume" in refused("--resume", str(empty))
    assert "--resume FOLDER" in refused("--resume")
    assert "lr was 0.003, is 0.1" in refused(*resume, "--lr", "0.1")
    assert "data was" in refused(*resume, "--data", ARTICLE)
    assert "lora was {" in refused(*resume, "--lora.alpha", "3")
    assert "or pass --resume or --overwrite true" in refused(*arguments)
    other = str(tmp_path / "other")
    assert f"--res_path names {other}: give one." in refused(*resume, "--res_path", other)
    assert "--resume and --overwrite exclude each other" in refused(*resume, "--overwrite")
    with script("runs.folder").locked(out):
        assert f"Another run works in {out}: " in refused(*resume)
        assert f"Another run works in {out}: " in refused(*arguments, "--overwrite")
    assert train([*resume]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--validation", "2"], "A share must be above 0 and below 1"),
        (["--validation", "1e-9"], "leaves none to evaluate on"),
        (["--validation", ARTICLE], "Every validation example has a prompt that is learnt too"),
        (["--patience", "2"], "patience and eval_every need validation data"),
        (["--patience", "0", "--validation", "0.5"], "patience must be an integer of at least 1"),
        (["--save_every", "0"], "save_every must be an integer of at least 1"),
        (["--tasks", ARTICLE, "--validation", "0.5", "--resume"], "has nothing to resume"),
    ],
    ids=lambda value: " ".join(value)[-30:] if isinstance(value, list) else "",
)
def test_bad_validation_is_one_line(arguments, said, script, quick, capsys, tmp_path):
    assert script("train_qa").main([*quick, *arguments, "--res_path", str(tmp_path / "never")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert list(tmp_path.iterdir()) == []


def test_validation_that_overlaps_training_is_left_out_and_said(
    script, quick, tmp_path, capsys, many
):
    file = tmp_path / "valid.jsonl"
    file.write_text("\n".join([MANY[3], '{"prompt": "Q99:", "completion": " x"}']))
    arguments = [*quick, "--data", many, "--validation", str(file), "--eval_every", "2"]
    assert script("train_qa").main([*arguments, "--res_path", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "Validation: 1 examples." in said
    assert "1 others share a prompt with the training data: left out." in said


def test_a_run_that_was_killed_before_it_kept_an_adapter_says_how_to_go_on(
    script, tmp_path, capsys
):
    place, asked = tmp_path / "killed", tmp_path / "ask.txt"
    place.mkdir()
    (place / "options.yaml").write_text("seed: 1\n")
    asked.write_text("Q:\n")
    for name, arguments in {
        "generate": ["Q:", "--adapter", str(place)],
        "predict": [str(asked), "--adapter", str(place)],
        "merge": [str(place), str(tmp_path / "out")],
    }.items():
        assert script(name).main(arguments) == 2
        line = f"{place} has no adapter yet: go on with --resume {place}.\n"
        assert capsys.readouterr().err == line
    assert not (tmp_path / "out").exists()


# What was wrong once


@pytest.mark.parametrize("metrics", ["torn", "short", "long", "none"])
def test_the_metrics_of_a_killed_run_decide_nothing(metrics, script, capsys, whole, cut):
    """They are not flushed as the snapshot is, and a power cut leaves any part of them."""
    folder = cut(5)
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    later = lines[-1].replace('"step": 4', '"step": 6')
    texts = {"torn": [*lines[:3], lines[3][:-9]], "short": lines[:2], "long": [*lines, later]}
    file.write_text("".join(texts.get(metrics, [])))
    capsys.readouterr()
    assert script("train_qa").main(["--resume", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "fell no more" not in said
    assert "step     7 · loss" in said
    one, other = record_of(whole), record_of(folder)
    assert one["steps"] == other["steps"] == 7
    assert one["answers"] == other["answers"]
    assert weights_of(folder, "adapter") == weights_of(whole, "adapter")
    steps = [row["step"] for row in rows(file)]
    assert steps == sorted({*steps})
    assert steps[-2:] == [6, 7]


def test_a_file_called_as_a_searchs_winner_names_no_search(script, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("best.jsonl").write_text("\n".join(MANY))
    assert script("train_qa").main([*quick, "--tasks", "best.jsonl"]) == 0
    assert [place.name for place in Path("runs").iterdir()] == ["qa-1"]


def test_bundled_data_is_asked_its_own_prompts(script):
    """But for the article's and its parts, whose prompts lie beside it."""
    data, options_of = script("runs.data"), script("train_qa").options_of
    tasks = sorted(str(file) for file in (SCRIPTS / "data" / "tasks").iterdir())
    weather = str(SCRIPTS / "data" / "weather.jsonl")
    article = "Q: How do transformers work?"
    for argv, first in (
        (["--data", weather], "Q: Tunis"),
        (["--data", ARTICLE], article),
        (["--tasks", *tasks], article),
    ):
        options = options_of(argv)
        prompts = data.prompts_of(data.read(options), options)
        assert prompts[0].text.startswith(first)
