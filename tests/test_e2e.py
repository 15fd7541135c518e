"""The benchmark of the LoRA paper's task, whole, on made-up meaning representations."""

from __future__ import annotations

import gzip
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import gpt2

pytest.importorskip("yaml", reason="the benchmark reads its recipe (extra: scripts)")
pytest.importorskip("peft", reason="the benchmark trains PEFT's adapter too (extra: peers)")

from benchmarks import e2e

FOODS, AREAS = ("Thai", "Greek", "French", "Indian", "Fast"), ("riverside", "city centre")


@pytest.fixture
def data(small_base, tmp_path, monkeypatch):
    """Twenty meaning representations, two descriptions each; the recipe's base is a small one."""
    recipe = e2e.RECIPE.read_text().replace("r: 64, alpha: 64", "r: 8, alpha: 8")
    recipe = recipe.replace("model_name: demo", f"model_name: {small_base}")
    (tmp_path / "recipe.yaml").write_text(recipe)
    monkeypatch.setattr(e2e, "RECIPE", tmp_path / "recipe.yaml")
    rows = [
        {"prompt": f"name : {name} | food : {food} | area : {area} ||", "completion": said}
        for name in ("Alma", "Bo")
        for food in FOODS
        for area in AREAS
        for said in (f" {name} serves {food} food in the {area} .", f" {name} is in the {area} .")
    ]
    lines = [json.dumps(row) + "\n" for row in rows]
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as file:
        file.writelines(lines[:24])
    (tmp_path / "valid.jsonl").write_text("".join(lines[24:32]))
    (tmp_path / "test.jsonl").write_text("".join(lines[32:]))
    return tmp_path


@pytest.fixture
def judged(monkeypatch):
    """What sacrebleu would be asked; it need not be installed."""
    calls: list[tuple[list[str], list[list[str | None]]]] = []

    def corpus_bleu(texts, references, *, lowercase, tokenize):
        assert (lowercase, tokenize) == (True, "13a")
        calls.append((texts, references))
        return SimpleNamespace(score=100.0 * (texts == references[0]))

    monkeypatch.setitem(sys.modules, "sacrebleu", SimpleNamespace(corpus_bleu=corpus_bleu))
    return calls


def started(monkeypatch, *argv) -> None:
    monkeypatch.setattr(sys, "argv", ["e2e", *map(str, argv), "--device", "cpu"])
    e2e.main()


def test_every_case_runs_and_tells_its_loss_bleu_and_seconds(data, judged, monkeypatch):
    started(monkeypatch, data, "--quick", "--out", data / "out.jsonl")
    lines = [json.loads(line) for line in (data / "out.jsonl").read_text().splitlines()]
    assert [line["case"] for line in lines] == list(e2e.CASES)
    base, ours, plain, theirs, full = lines
    assert [line["steps"] for line in lines] == [0, 3, 2, 3, 3]
    assert "valid_loss" not in plain
    assert base["valid_loss"] > ours["valid_loss"]
    assert base["valid_loss"] > full["valid_loss"]
    assert ours["valid_loss"] == pytest.approx(theirs["valid_loss"], abs=2e-3)  # the same run
    assert {(line["prompts"], line["timed"]) for line in lines} == {(4, "alone")}
    assert {"greedy_bleu", "beams_bleu", "greedy_seconds", "beams_seconds"} <= ours.keys()
    assert [len(texts) for texts, _ in judged[1:]] == [4] * 8
    assert judged[1][1] == judged[-1][1]
    assert len(judged[1][1]) == 2


def test_choosing_sees_no_test_file(data, judged, monkeypatch):
    (data / "test.jsonl").unlink()
    grid = ["r=2", "targets=[[c_attn], ['c_attn[q,v]']]"]
    started(monkeypatch, data, "--quick", "--out", data / "out.jsonl", "--choose", *grid)
    lines = [json.loads(line) for line in (data / "out.jsonl").read_text().splitlines()]
    assert [line["benchmark"] for line in lines] == ["e2e_choose"] * 2
    assert [line["trainable"] for line in lines] == [2 * 2 * (32 + 96), 2 * 2 * 2 * (32 + 32)]
    with pytest.raises(SystemExit, match="recipe has no rank, only"):
        started(monkeypatch, data, "--quick", "--choose", "rank=2")


def test_the_held_out_loss_is_each_tokens_alone(demo, tokenizer):
    examples = [
        gpt2.Example("a b c", " d e"),
        gpt2.Example("f", " g h i j k"),
        gpt2.Example("l", " m"),
    ]
    data = gpt2.encode(examples, tokenizer, answer_only=True)
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for ids, labels in data:
            total += demo(ids[None], labels[None])
    tokens = sum(int((labels[1:] >= 0).sum()) for _, labels in data)
    for size in (1, 2, 64):
        found = e2e.held_out_loss(demo, data, batch_size=size)
        assert found == pytest.approx(total.item() / tokens, rel=1e-6)


def test_bleu_takes_any_number_of_references():
    pytest.importorskip("sacrebleu", reason="extra: benchmarks")
    references = [[" A pub .", " one ."], [" Another pub in the city centre ."]]
    assert e2e.bleu(["one .", "another pub in the CITY centre ."], references) == pytest.approx(100)
    assert e2e.bleu(["two", "nothing of the kind"], references) < 10
