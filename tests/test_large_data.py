"""`train_qa.py` on data that is kept on disk: as in memory, to the byte, and made once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import gpt2
from tests.script_runs import record_of, rows, write_rows

ROWS = [{"question": f"What is {i}?", "answer": f"It is {i % 7}."} for i in range(60)]


@pytest.fixture
def short(quick) -> list[str]:
    return [*quick, "--answer_only", "true"]


@pytest.fixture
def data(tmp_path) -> Path:
    file = tmp_path / "mine" / "data.jsonl"
    file.parent.mkdir()
    return write_rows(file, [*ROWS, ROWS[0]])


def written(folder: Path) -> dict[str, object]:
    """What a run is judged by: adapters, losses, answers, what was found on validation data."""
    record, metrics = record_of(folder), rows(folder / "metrics.jsonl")
    return {
        "adapters": [f.read_bytes() for f in sorted(folder.rglob("*.safetensors"))],
        "losses": [(m["step"], m["loss"], m.get("validation")) for m in metrics],
        "tuned": [a["tuned"] for a in record["answers"]],
        "data": record["data"],
        "validation": record.get("validation"),
    }


WAYS = {
    "plain": ["--train_batch_size", "4"],
    "buckets": ["--tokens_per_batch", "128"],
    "packed": ["--tokens_per_batch", "256", "--packing", "true"],
    "a share": ["--validation", "0.3"],
    "a file": ["--validation", "VALID"],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_on_a_store_is_the_run_in_memory(
    way, script, short, tmp_path, data, monkeypatch, capsys
):
    valid = tmp_path / "valid.jsonl"
    valid.write_text("".join(json.dumps(r) + "\n" for r in [ROWS[3], {"text": "It is so."}]))
    options = [str(valid) if word == "VALID" else word for word in WAYS[way]]
    train = script("train_qa").main
    arguments = [*short, "--data", str(data), *options, "--res_path"]
    assert train([*arguments, str(tmp_path / "memory")]) == 0
    told = capsys.readouterr().out
    assert [f.name for f in data.parent.iterdir()] == ["data.jsonl"]
    monkeypatch.setattr("gpt2.data.store.SMALL", 10)
    assert train([*arguments, str(tmp_path / "disk")]) == 0
    said = capsys.readouterr().out
    assert f"The tokens of {data} are written to {data}." in said
    made = sorted(f.name for f in data.parent.iterdir())
    sides = [".0-0.3", ".0.3-1"] if way == "a share" else [""]
    assert made == ["data.jsonl", *(f"data.jsonl{side}.tokens" for side in sides)]
    before = {f: f.stat().st_mtime_ns for f in data.parent.rglob("*")}
    assert train([*arguments, str(tmp_path / "again")]) == 0
    assert "are written to" not in capsys.readouterr().out
    assert {f: f.stat().st_mtime_ns for f in data.parent.rglob("*")} == before
    assert written(tmp_path / "disk") == written(tmp_path / "memory") == written(tmp_path / "again")
    (line,) = (line for line in told.splitlines() if " steps, by " in line)
    assert line in said
    assert way[:2] != "a " or " Validation: " in line


def test_a_cache_is_named_made_anew_and_found(script, short, tmp_path, data, capsys):
    train, cache = script("train_qa").main, tmp_path / "cache"
    arguments = [*short, "--data", str(data), "--cache", str(cache)]

    def said(*more: str) -> str:
        assert train([*arguments, *more, "--res_path", str(tmp_path / "run"), "--overwrite"]) == 0
        return capsys.readouterr().out

    assert f"are written to {cache}/data.jsonl." in (line := said())
    assert ".tokens: there are none yet." in line
    assert "are written to" not in said()
    assert "max_length was 128 and is 20" in said("--max_token_length", "20")
    with data.open("a") as file:
        file.write(json.dumps({"question": "More?", "answer": "Yes."}) + "\n")
    assert "bytes was" in said("--max_token_length", "20")
    assert len([*cache.iterdir()]) == 1


def full_disk(*_) -> None:
    raise OSError(28, "No space left on device")


def test_a_folder_that_takes_no_tokens_is_one_line(
    script, short, tmp_path, data, monkeypatch, capsys
):
    monkeypatch.setattr("gpt2.data.store.SMALL", 10)
    real = os.mkdir

    def refused(path, *rest, **more):
        if str(path).startswith(str(data.parent)):
            raise PermissionError(13, "Permission denied", str(path))
        real(path, *rest, **more)

    monkeypatch.setattr(os, "mkdir", refused)
    arguments = [*short, "--data", str(data), "--res_path", str(tmp_path / "never")]
    assert script("train_qa").main(arguments) == 2
    error = capsys.readouterr().err
    assert error == (
        f"The tokens cannot be written to {data.parent} (Permission denied): "
        "name another folder as cache.\n"
    )
    assert not (tmp_path / "never").exists()
    cache = tmp_path / "cache"
    arguments += ["--cache", str(cache)]
    with monkeypatch.context() as patch:
        patch.setattr("gpt2.data.store.write", full_disk)
        assert script("train_qa").main(arguments) == 2
    said = f"The tokens cannot be written to {cache} (No space left on device): name another"
    assert capsys.readouterr().err.startswith(said)
    assert list(cache.iterdir()) == []
    assert script("train_qa").main(arguments) == 0


def test_prompts_of_a_large_file_are_taken_from_its_beginning(
    script, short, tmp_path, data, monkeypatch, capsys
):
    monkeypatch.setattr("gpt2.data.store.SMALL", 10)
    monkeypatch.setattr(script("runs.data"), "FIRST", 3)
    assert (
        script("train_qa").main([*short, "--data", str(data), "--res_path", str(tmp_path / "r")])
        == 0
    )
    answers = json.loads((tmp_path / "r" / "run.json").read_text())["answers"]
    assert [a["prompt"] for a in answers] == [f"Q: What is {i}?\nA:" for i in range(3)]
    assert [a["trained"] for a in answers] == [[f" It is {i}."] for i in range(3)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS[2:4]) + '{"text": "Else"}')
    arguments = [*short, "--data", str(data), "--prompts", str(prompts)]
    assert script("train_qa").main([*arguments, "--res_path", str(tmp_path / "s")]) == 0
    answers = json.loads((tmp_path / "s" / "run.json").read_text())["answers"]
    assert [a["verdict"] for a in answers] == ["differs", "reference: differs", "not compared"]


# Many prompts


def test_many_prompts_are_tried_in_chunks_and_shown_by_a_sample(
    script, short, tmp_path, data, monkeypatch, capsys
):
    asked: list[int] = []
    real = gpt2.generate

    def counted(model, ids, config):
        asked.append(len(ids))
        return real(model, ids, config)

    arguments = [*short, "--data", str(data), "--prompts", str(data), "--generate.temperature", "1"]
    train, continuing = script("train_qa").main, script("runs.answers")
    assert train([*arguments, "--res_path", str(tmp_path / "one")]) == 0
    monkeypatch.setattr(gpt2, "generate", counted)
    monkeypatch.setattr(continuing, "ROWS", {"cpu": 8})
    capsys.readouterr()
    assert train([*arguments, "--res_path", str(tmp_path / "chunks")]) == 0
    said = capsys.readouterr().out
    assert max(asked) == 8
    assert sum(asked) == 2 * 60  # one prompt stands there twice
    assert "Answers, 12 of 60" in said
    assert said.partition("To use it:")[0].count("Q: What is") == 12
    assert " of 60 trained prompts answered word for word." in said
    for name in ("one", "chunks"):
        record = json.loads((tmp_path / name / "run.json").read_text())
        assert len(record["answers"]) == 12
        assert " of 60 trained prompts" in record["score"]
    one, other = ((tmp_path / name / "answers.md").read_text() for name in ("one", "chunks"))
    assert one == other  # each prompt draws its own numbers
    rows = [line.split(" | ")[0] for line in one.splitlines()[4:]]
    assert rows == [f"| Q: What is {i}?<br>A:" for i in range(60)]


def test_what_was_trained_is_found_for_every_prompt(script):
    answers = script("runs.answers")
    texts = [("a b", " c"), ("a", " b d"), ("", "a b e"), ("z", " y"), ("a b", " c")]
    examples = [gpt2.Example(*two) for two in texts]
    prompts = [script("runs.data").Prompt(p, ()) for p in ("a b", "a", "z y", "none", "")]
    found = answers.compare(prompts, ["base"], [[""]] * len(prompts), examples)
    slow = [[p + c for p, c in texts if (p + c).startswith(prompt.text)] for prompt in prompts]
    assert [[a["prompt"] + t for t in a["trained"]] for a in found] == slow
