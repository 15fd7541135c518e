"""The benchmark of the LoRA paper's task, whole, on made-up meaning representations."""

from __future__ import annotations

import gzip
import json
import sys

import pytest

pytest.importorskip("yaml", reason="the benchmark reads its recipe (extra: scripts)")
pytest.importorskip("sacrebleu", reason="the benchmark takes BLEU (extra: scores)")
pytest.importorskip("peft", reason="the benchmark trains PEFT's adapter too (extra: peers)")

import yaml

from benchmarks import e2e

FOODS, AREAS = ("Thai", "Greek", "French", "Indian", "Fast"), ("riverside", "city centre")


@pytest.fixture
def data(small_base, tmp_path, monkeypatch):
    """Twenty meaning representations, two descriptions each; the recipe's base is a small one."""
    recipe = yaml.safe_load(e2e.RECIPE.read_text())
    recipe["lora"] |= {"r": 8, "alpha": 8}
    recipe["generate"] |= {"max_new_tokens": 8, "num_beams": 2}
    recipe |= {"model_name": small_base, "epochs": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
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
    """The texts whose BLEU is taken, with their references."""
    calls, bleu = [], e2e.bleu

    def recorded(texts, references):
        calls.append((texts, references))
        return bleu(texts, references)

    monkeypatch.setattr(e2e, "bleu", recorded)
    return calls


def started(monkeypatch, folder, *argv) -> list[dict]:
    """The lines of a run."""
    argv = ["e2e", str(folder), "--device", "cpu", "--out", str(folder / "out.jsonl"), *argv]
    monkeypatch.setattr(sys, "argv", argv)
    e2e.main()
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_every_case_runs_and_tells_its_loss_bleu_and_seconds(data, judged, monkeypatch):
    lines = started(monkeypatch, data)
    assert [line["case"] for line in lines] == list(e2e.CASES)
    base, ours, theirs, full = lines
    assert [line["steps"] for line in lines] == [0, 3, 3, 3]
    assert base["valid_loss"] > ours["valid_loss"]
    assert base["valid_loss"] > full["valid_loss"]
    assert ours["valid_loss"] == pytest.approx(theirs["valid_loss"], abs=2e-3)  # the same run
    assert {"greedy_bleu", "beams_bleu", "greedy_seconds", "beams_seconds"} <= ours.keys()
    assert [len(texts) for texts, _ in judged[1:]] == [4] * 12
    assert judged[1][1] == judged[2][1] != judged[3][1]  # greedy and beams, and of valid
    assert {len(references) for references in judged[1][1]} == {2}


def test_seeds_in_one_population_are_what_each_is_alone(data, judged, monkeypatch, capsys):
    recipe = e2e.RECIPE.read_text()
    line, theirs = started(monkeypatch, data, "--seeds", "2", "--cases", "ours", "PEFT")
    assert (line["case"], line["label_smoothing"]) == ("ours, 2 seeds", 0.1)
    assert theirs["valid_loss_of_each"] == pytest.approx(line["valid_loss_of_each"], abs=4e-3)
    assert line["agreement_bleu"] == line["beams_bleu_of_each"][0]  # of two equals the first
    assert line["beams_bleu_of_best_valid_bleu"] in line["beams_bleu_of_each"]
    every = line["valid_loss_of_each"]
    assert line["valid_loss"]["mean"] == pytest.approx(sum(every) / 2, abs=1e-4)
    assert line["valid_loss"]["sd"] == pytest.approx(abs(every[0] - every[1]) / 2**0.5, abs=1e-4)
    assert "valid_loss: " in capsys.readouterr().out
    for seed, loss in zip((42, 43), every, strict=True):
        alone = {**yaml.safe_load(recipe), "seed": seed, "label_smoothing": 0.1}
        e2e.RECIPE.write_text(yaml.safe_dump(alone))
        *_, line = started(monkeypatch, data, "--cases", "ours")
        assert line["valid_loss"] == pytest.approx(loss, abs=2e-4)


def test_bleu_takes_any_number_of_references():
    references = [[" A pub .", " one ."], [" Another pub in the city centre ."]]
    assert e2e.bleu(["one .", "another pub in the CITY centre ."], references) == pytest.approx(100)
    assert e2e.bleu(["two", "nothing of the kind"], references) < 10
