"""`train_qa.py --tasks`: each adapter with validation, patience, snapshots, as if it were alone."""

from __future__ import annotations

import importlib
import os
import signal
from pathlib import Path

import pytest

import gpt2
import lora
from tests.script_runs import VALID, record_of, rows, write_rows
from tests.toys import split

NAMES = ("sea", "land", "air")


@pytest.fixture
def files(tmp_path) -> list[str]:
    for name in NAMES:
        lines = [{"prompt": f"{name} {i}:", "completion": f" {i} {name}"} for i in range(12)]
        write_rows(tmp_path / f"{name}.jsonl", lines)
    return [str(tmp_path / f"{name}.jsonl") for name in NAMES]


def kept(folder: Path) -> dict[str, object]:
    """What is kept of one adapter: weights, losses, what was found on its validation data."""
    metrics = rows(folder / "metrics.jsonl")
    return {
        "weights": [f.read_bytes() for f in sorted(folder.rglob("adapter_model.safetensors"))],
        "losses": [(m["step"], m["loss"], m.get("validation")) for m in metrics],
        "validation": record_of(folder)["validation"],
    }


def test_each_has_validation_its_best_and_its_last(
    script, small_base, quick, tmp_path, files, capsys
):
    train, out = script("train_qa").main, tmp_path / "out"
    arguments = [*quick, "--steps", "5", *VALID, "--lr", "0.03", "--save_every", "2"]
    assert train([*arguments, "--tasks", *files, "--res_path", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.count("examples, by their prompts.") == 3
    assert sum(line.startswith("step     0 · validation") for line in said.splitlines()) == 3
    for name, file in zip(NAMES, files, strict=True):
        made = {"adapter_config.json", "adapter_model.safetensors", "last", "metrics.jsonl"}
        assert {p.name for p in (out / name).iterdir()} - {"README.md"} == {*made, "run.json"}
        if name == "air":
            continue
        alone = tmp_path / f"alone-{name}"
        assert train([*arguments, "--tasks", file, "--res_path", str(alone)]) == 0
        assert kept(alone / name) == kept(out / name)
        told = kept(out / name)["validation"]
        held_out = split(gpt2.read_examples(file), 0.4)[1]
        model = gpt2.GPT2.from_pretrained(small_base)
        lora.load(model, out / name)
        found = gpt2.evaluate(model, gpt2.encode(held_out, gpt2.Tokenizer()), batch_size=2)
        assert found.loss == pytest.approx(told["losses"][str(told["best_step"])], rel=1e-6)
        single = tmp_path / f"single-{name}"  # and as `train_qa.py --data` would have it
        assert train([*arguments, "--data", file, "--res_path", str(single)]) == 0
        weights = [p / "adapter_model.safetensors" for p in (single / "adapter", out / name)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_patience_ends_each_by_itself(script, quick, tmp_path, files, capsys, monkeypatch):
    fitting = importlib.import_module("gpt2.training.fitting")
    losses = iter([1, 2, 3, 9, 8, 7, 9, 9, 5, 2, 3, 4])  # of sea, of land, of air
    fake = lambda *_, **__: gpt2.Evaluation(loss=float(next(losses)), tokens=1, examples=1)  # noqa: E731
    monkeypatch.setattr(fitting, "evaluate", fake)
    out = tmp_path / "out"
    arguments = [*quick, "--steps", "8", *VALID, "--patience", "2", "--res_path", str(out)]
    assert script("train_qa").main([*arguments, "--tasks", *files]) == 0
    steps = [record_of(out / n)["steps"] for n in NAMES]
    best = [kept(out / n)["validation"]["best_step"] for n in NAMES]
    assert (steps, best) == ([4, 8, 6], [0, 4, 2])


@pytest.mark.parametrize("stops", [(5, 8), (3, 12, 13)])
def test_a_run_of_several_goes_on_where_it_was_stopped(
    stops, script, quick, tmp_path, files, capsys, monkeypatch
):
    """A stop after so many steps of all; what is resumed is what was never stopped."""
    train, saving = script("train_qa").main, script("runs.train")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = [*quick, "--steps", "5", *VALID, "--tasks", *files, "--res_path"]
    assert train([*arguments, str(whole)]) == 0
    taken = 0

    def stopping(record, place):
        nonlocal taken
        taken += 1
        return taken in stops

    for i in range(len(stops)):
        with monkeypatch.context() as patch:
            patch.setattr(saving, "recorded", stopped(saving.recorded, stopping))
            capsys.readouterr()
            assert train(["--resume", str(cut)] if i else [*arguments, str(cut)]) == 143
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.endswith(f" Go on with --resume {cut}.\n")
    assert train(["--resume", str(cut)]) == 0
    for name in NAMES:
        assert kept(cut / name) == kept(whole / name)
    assert (cut / "answers.md").read_bytes() == (whole / "answers.md").read_bytes()
    assert not list(cut.rglob("*snapshot*"))
    assert train(["--resume", str(cut)]) == 2
    assert "or the run has ended" in capsys.readouterr().err


def stopped(recorded, stops):
    """`saving.recorded`, with a SIGTERM after each step that `stops` says."""

    def until(run, place):
        for record in recorded(run, place):
            yield record
            if stops(record, place):
                os.kill(os.getpid(), signal.SIGTERM)

    return until


def test_another_file_or_option_is_refused(script, quick, tmp_path, files, capsys, monkeypatch):
    train, saving, out = script("train_qa").main, script("runs.train"), tmp_path / "out"
    arguments = [*quick, "--steps", "5", *VALID, "--tasks", *files, "--res_path", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(saving, "recorded", stopped(saving.recorded, lambda *_: True))
        assert train(arguments) == 143
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert train(["--resume", str(out), "--lr", "0.1"]) == 2
    assert "lr was 0.003, is 0.1" in capsys.readouterr().err
    assert train(["--resume", str(out), "--tasks", *files[:2]]) == 2
    assert "tasks was [" in capsys.readouterr().err
    (out / "sea" / "snapshot.safetensors").rename(tmp_path / "kept")  # an adapter's options too
    assert train(["--resume", str(out), "--lora.alpha", "3"]) == 2
    assert "lora was {" in capsys.readouterr().err
    (tmp_path / "kept").rename(out / "sea" / "snapshot.safetensors")
    Path(files[0]).write_text('{"prompt": "a", "completion": "b"}\n' * 9 + '{"text": "c d"}')
    assert train(["--resume", str(out)]) == 2
    assert "data was" in capsys.readouterr().err
    assert train(arguments) == 2
    assert "or pass --resume or --overwrite true" in capsys.readouterr().err
    with script("runs.folder").locked(out):
        assert train([*arguments, "--overwrite"]) == 2
    assert "Another run works in" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_file_that_changed_after_its_adapter_was_trained_is_refused(
    script, quick, tmp_path, files, capsys, monkeypatch
):
    train, saving, out = script("train_qa").main, script("runs.train"), tmp_path / "out"
    arguments = [*quick, "--steps", "2", *VALID, "--tasks", *files, "--res_path", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(
            saving, "recorded", stopped(saving.recorded, lambda _, place: place.name == "air")
        )
        assert train(arguments) == 143
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    was = {file: Path(file).read_bytes() for file in files}
    for file in files[:2]:  # the same number of examples, one of them another
        Path(file).write_bytes(was[file].replace(b" 7 ", b" 8 "))
    capsys.readouterr()
    assert train(["--resume", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "sea, land: the data has changed" in error
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    for file, text in was.items():
        Path(file).write_bytes(text)
    assert train(["--resume", str(out)]) == 0


def test_many_prompts_are_tried_in_chunks_and_shown_by_a_sample(
    script, quick, tmp_path, files, capsys, monkeypatch
):
    train, answering, real = script("train_qa").main, script("runs.answers"), gpt2.generate
    asked: list[int] = []

    def counted(model, ids, config):
        asked.append(len(ids))
        return real(model, ids, config)

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{name} {i}:\n" for i in range(10) for name in NAMES))
    arguments = [*quick, "--tasks", *files, "--prompts", str(prompts)]
    arguments += ["--generate.temperature", "1", "--res_path"]
    assert train([*arguments, str(tmp_path / "one")]) == 0
    monkeypatch.setattr(gpt2, "generate", counted)
    monkeypatch.setattr(answering, "ROWS", {"cpu": 16})
    capsys.readouterr()
    assert train([*arguments, str(tmp_path / "chunks")]) == 0
    assert "One batch, many adapters, 10 of 30" in capsys.readouterr().out
    assert asked == [16, 14] + [16] * 7 + [8]  # the base; three adapters and their mixture
    one, other = ((tmp_path / name / "answers.md").read_text() for name in ("one", "chunks"))
    assert one == other
    head, _, *rows = one.splitlines()
    assert head == f"| prompt | base | {' | '.join(NAMES)} | mixture |"
    assert len(rows) == 30
