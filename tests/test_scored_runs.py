"""`--score` and `--agree`: runs that are chosen by what the model says, and texts that agree."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import gpt2
import lora
from tests.script_runs import QUICK, record_of, rows, write_rows

SCORES = """
def length(texts, references):
    return sum(map(len, texts)) / len(texts)

def short(texts, references):
    return -length(texts, references)

def shared(texts, references):
    pairs = zip(texts, references)
    return sum(len({*text} & {*of[0]}) for text, of in pairs) / len(texts)
"""
TEXTS = ["the cat sat on the mat", "a cat was on the mat", "dogs do not sit down", ""]


@pytest.fixture
def here(small_base, tmp_path, monkeypatch) -> Path:
    """A folder with a small base, data, two adapters and functions that score."""
    monkeypatch.chdir(tmp_path)
    Path("small").symlink_to(small_base)
    Path("own.py").write_text(SCORES)
    pairs = [{"prompt": f"Q{i}:", "completion": f" answer {i} is long"} for i in range(20)]
    write_rows(Path("data.jsonl"), pairs)
    for seed in (1, 2, 3):
        model = gpt2.GPT2.from_pretrained("small")
        lora.inject(model, r=2, seed=seed)
        for module in model.modules():
            if isinstance(module, lora.LoRALinear):
                module.updates["default"].B.data.normal_(std=0.5)
        lora.save(model, Path(str(seed)))
    return tmp_path


def train(script, *more: str) -> int:
    options = ["--model_name", "small", "--data", "data.jsonl", "--validation", "0.4"]
    options += ["--eval_every", "1", "--lr", "0.03", "--res_path", "run"]
    return script("train_qa").main([*QUICK, *options, *more])


def predict(script, *more: str) -> int:
    options = ["data.jsonl", "--base", "small", "--device", "cpu", "--max_new_tokens", "4"]
    return script("predict").main([*options, *more])


def test_a_run_is_chosen_by_a_function_of_a_file(here, script, capsys, quick):
    scoring = ["--score", "own.py:length", "--choose_by", "score", "--score_prompts", "4"]
    assert train(script, *scoring) == 0
    record, lines = record_of(Path("run")), rows(Path("run/metrics.jsonl"))
    scores, (low, high) = record["scores"], record["scores"]["interval"]
    by_step = {int(step): score for step, score in scores["by_step"].items()}
    assert [*by_step] == [0, 1, 2, 3]
    assert [line["score"] for line in lines] == [*by_step.values()][1:]
    best = record["validation"]["best_step"]
    assert by_step[best] == scores["value"] == max(by_step.values())
    assert low <= scores["value"] <= high
    assert (scores["name"], scores["prompts"]) == ("own.py:length", 4)
    shown = f"Score: own.py:length {scores['value']:.4g} (95 %: {low:.4g} to {high:.4g})"
    assert shown in capsys.readouterr().out
    page = Path("run/report.html").read_text()
    assert f"{scores['value']:.4f} ({low:.4f} to {high:.4f})" in page


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [((2.0, 3.0), "better than"), ((0.5, 3.0), "not distinguishable"), ((0.1, 0.9), "WORSE than")],
)
def test_a_difference_within_the_interval_is_not_called_better(script, interval, verdict):
    result = {"name": "exact", "value": 2.5, "interval": interval, "by_step": {0: 1.0}}
    assert verdict in script("runs.scores").line(result)


def test_bleu_and_chrf_are_sacrebleus(script):
    sacrebleu = pytest.importorskip("sacrebleu")
    named, references = script("runs.scores").named, [[t, "a mat"] for t in TEXTS[1:] + TEXTS[:1]]
    columns = [[of[i] for of in references] for i in range(2)]
    assert named("bleu")(TEXTS, references) == sacrebleu.corpus_bleu(TEXTS, columns).score
    assert named("chrf")(TEXTS, references) == sacrebleu.corpus_chrf(TEXTS, columns).score
    low, high = named("bleu").interval(TEXTS, references)
    assert low < named("bleu")(TEXTS, references) < high
    assert named("bleu").interval(TEXTS, references) == (low, high)


def test_the_text_that_others_are_most_like_is_chosen_and_of_equals_the_first(script):
    pytest.importorskip("sacrebleu")
    agreed, bleu = script("runs.scores").agreed, script("runs.scores").named("bleu")
    texts = ["dogs", TEXTS[0], "a cat sat on the mat", "the cat is on the mat"]
    assert agreed(texts, bleu) == 1
    assert agreed(texts[::-1], bleu) == 2
    assert agreed(["b", "a", "a"], gpt2.exact_match) == 1
    assert agreed(["a", "b", "c"], gpt2.exact_match) == 0


def test_several_adapters_agree_and_a_stopped_file_is_resumed(here, script, capsys):
    agree = ["--adapter", "1", "2", "3", "--agree", "own.py:shared", "--output", "out.jsonl"]
    assert predict(script, *agree) == 0
    single = []
    for number in "123":
        assert predict(script, "--adapter", number, "--output", f"alone-{number}.jsonl") == 0
        assert (
            Path(f"out-{number}.jsonl").read_bytes() == Path(f"alone-{number}.jsonl").read_bytes()
        )
        single.append([row["prediction"] for row in rows(Path(f"out-{number}.jsonl"))])
    score = script("runs.scores").named("own.py:shared")
    for row, texts in zip(rows(Path("out.jsonl")), zip(*single, strict=True), strict=True):
        assert row["predictions"] == [*texts]
        best = script("runs.scores").agreed(texts, score)
        assert (row["prediction"], row["adapter"]) == (texts[best], str(best + 1))
    assert len({row["adapter"] for row in rows(Path("out.jsonl"))}) > 1

    whole = Path("out.jsonl").read_bytes()
    Path("out.jsonl").write_bytes(whole[: len(whole) // 2])
    second = Path("out-2.jsonl")
    second.write_bytes(second.read_bytes()[:100])
    assert predict(script, *agree) == 0
    assert Path("out.jsonl").read_bytes() == whole
    assert second.read_bytes() == Path("alone-2.jsonl").read_bytes()


def test_predictions_are_scored_with_an_interval(here, script, capsys):
    assert predict(script, "--adapter", "1", "--score", "own.py:length") == 0
    length = sum(len(row["prediction"]) for row in rows(Path("predictions.jsonl"))) / 20
    assert f"own.py:length {length:.4g} (95 %: " in capsys.readouterr().out


def test_a_mixture_is_measured_beside_its_parts(here, script, capsys, quick):
    lines = Path("data.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("a", lines[:10]), ("b", lines[10:])):
        Path(f"{name}.jsonl").write_text("".join(part))
    assert train(script, "--tasks", "a.jsonl", "b.jsonl") == 0
    losses = record_of(Path("run"))["mixture"]
    model = gpt2.GPT2.from_pretrained("small")
    for name in "ab":
        lora.load(model, Path("run", name), adapter=name)
    shown = capsys.readouterr().out
    for task in "ab":
        assert {*losses[task]} == {"a", "b", "mixture"}
        best = min(
            json.loads(Path("run", task, "run.json").read_text())["validation"]["losses"].values()
        )
        assert losses[task][task] == pytest.approx(best, rel=1e-6)
        assert losses[task]["mixture"] not in (losses[task]["a"], losses[task]["b"])
        worst = losses[task]["mixture"] > max(losses[task]["a"], losses[task]["b"])
        line = next(line for line in shown.splitlines() if line.startswith(f"Validation on {task}"))
        assert ("The mixture is the worst." in line) is worst


def test_a_searchs_finals_are_chosen_by_the_score_of_all_seeds(here, script, capsys):
    pytest.importorskip("optuna")
    options = {
        "model_name": "small",
        "device": "cpu",
        "data": "data.jsonl",
        "validation": "0.4",
        "steps": 4,
        "train_batch_size": 2,
        "lora": {"r": 2, "targets": ["c_attn"]},
        "space": {"lr": [1e-3, 0.03, 0.1]},
        "trials": 3,
        "rungs": 1,
        "finalists": 3,
        "seeds": 2,
        "score_prompts": 4,
        "choose_by": "score",
    }
    Path("search.yaml").write_text(json.dumps(options))
    winners = []
    for name in ("length", "short"):
        words = ["--config", "search.yaml", "--score", f"own.py:{name}", "--res_path", name]
        assert script("search").main(words) == 0
        run, board = record_of(Path(name)), rows(Path(name, "leaderboard.jsonl"))
        scores = {row["trial"]: row["score"] for row in board}
        winners.append(run["winner"]["trial"])
        assert winners[-1] == max(scores, key=lambda n: scores[n]["value"])
        assert {score["prompts"] for score in scores.values()} == {8}  # four of each seed
        low = run["winner"]["score"]["interval"][0]
        near = [n for n, s in scores.items() if s["value"] >= low and n != winners[-1]]
        assert sorted(run["indistinguishable"]) == sorted(near)
        assert f"own.py:{name} over 2 seeds" in capsys.readouterr().out.replace("\n", " ")
    assert len({*winners}) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--score", "rouge"], "No score 'rouge': give exact, bleu, chrf or file.py:function."),
        (["--score", "own.py:none"], "own.py has no function none."),
        (["--choose_by", "score"], "choose_by score needs --score."),
        (["--score", "exact", "--validation", "null"], "A score needs --validation."),
    ],
)
def test_a_run_that_cannot_be_scored_is_refused_before_it(here, script, capsys, words, message):
    assert train(script, *words) == 2
    assert message in capsys.readouterr().err
    assert not Path("run").exists()


def test_a_missing_sacrebleu_names_the_extra(script, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ValueError, match=r"bleu: pip install 'lora-gpt2\[scores\]'"):
        script("runs.scores").named("bleu")


@pytest.mark.parametrize("words", [["--adapter", "1", "--agree"], ["--adapter", "1", "2"]])
def test_one_adapter_agrees_with_none(here, script, capsys, words):
    assert predict(script, *words) == 2
    assert "--agree takes several adapters" in capsys.readouterr().err
    assert not Path("predictions.jsonl").exists()
