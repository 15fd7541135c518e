"""Scores of generated text: what is scored, its interval, and a fit that is chosen by it."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch

import gpt2
from gpt2 import Example, RunConfig, TrainConfig, encode, evaluate
from gpt2.training.scores import Scorer, interval
from tests.processes import together
from tests.runs import DATA, STILL, Letters, Logits, model_of, weights

PAIRS = [("ab", "cde"), ("abc", "fg"), ("ab", "h"), ("x", "yz"), ("abc", "ij")]
ASKED = encode([Example(*pair) for pair in PAIRS], Letters(), eos=False)
CONFIG = TrainConfig(lr=1e-2, steps=8, batch_size=3)


def text(letters: str) -> str:
    return gpt2.Tokenizer().decode(Letters().encode(letters))


class Scripted:
    """A score that gives these values, one a call."""

    def __init__(self, *values: float) -> None:
        self.values = iter(values)

    def __call__(self, texts, references) -> float:
        return next(self.values)


def fitted(
    score, steps: int | None = None, folder=None, resume: bool = False, **options
) -> gpt2.Fit:
    how = {"score": score, "choose_by": "score"} | options
    model, run = model_of(adapter=True), RunConfig(eval_every=2, folder=folder)
    fit = gpt2.fit(model, DATA, CONFIG, validation=ASKED, run=run, resume=resume, **how)
    for record in islice(fit, steps):
        _ = record.loss
    return fit


@pytest.mark.parametrize("prompts", [None, 2])
def test_each_prompt_is_continued_greedily_and_compared_with_all_its_completions(prompts):
    model, calls = model_of().train(), []

    def score(texts, references):
        calls.append((texts, references))
        return 0.25

    result = evaluate(model, ASKED, score=score, prompts=prompts)
    texts, references = calls[0]
    room = gpt2.GenerateConfig(max_new_tokens=3)
    asked = ["ab", "abc", "x"][:prompts]
    rows = [gpt2.generate(model, [Letters().encode(p)], room)[0] for p in asked]
    assert texts == [gpt2.Tokenizer().decode(row) for row in rows]
    assert (
        references == [[text("cde"), text("h")], [text("fg"), text("ij")], [text("yz")]][:prompts]
    )
    assert (result.score, result.interval) == (0.25, (0.25, 0.25))
    assert result.loss == evaluate(model, ASKED).loss
    assert model.training


def test_exact_match_is_the_share_of_texts_that_a_reference_has():
    texts = ["yes", " no ", "perhaps", ""]
    references = [["no", "yes"], ["no"], ["yes", "no"], ["a"]]
    assert gpt2.exact_match(texts, references) == 0.5


def test_an_interval_is_of_drawn_prompts_and_always_the_same():
    texts = ["a"] * 30 + ["b"] * 70
    references = [["a"]] * 100
    low, high = interval(gpt2.exact_match, texts, references)
    assert low < 0.3 < high
    # The standard error of a share of 0.3 in 100 is 0.046.
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.3 * 0.7 / 100), rel=0.1)
    assert interval(gpt2.exact_match, texts, references) == (low, high)


def test_a_score_may_bring_its_interval():
    class Known:
        def __call__(self, texts, references):
            return 1.0

        def interval(self, texts, references):
            return (0.5, 2.0)

    assert evaluate(model_of(), ASKED, score=Known()).interval == (0.5, 2.0)


def test_the_best_has_the_highest_score_and_what_is_not_finite_is_never_the_best():
    nan, inf = math.nan, math.inf
    fit = fitted(Scripted(0.1, nan, 0.5, inf, 0.4))
    assert fit.best_step == 4
    assert [*fit.scores] == [*fit.evaluated] == [0, 2, 4, 6, 8]
    same = model_of(adapter=True)
    for _ in islice(gpt2.train(same, DATA, CONFIG), 4):
        pass
    assert weights(fit.model) == weights(same)


def test_patience_waits_for_the_score_and_a_record_has_it():
    fit = gpt2.fit(
        model_of(adapter=True),
        DATA,
        CONFIG,
        validation=ASKED,
        run=RunConfig(eval_every=2, patience=2),
        score=Scripted(0.1, 0.3, 0.2, 0.3),
        choose_by="score",
    )
    records = [record.metrics() for record in fit]
    assert [r["step"] for r in records if "score" in r] == [2, 4, 6]
    assert (len(records), fit.best_step, records[1]["score"]) == (6, 2, 0.3)


def test_without_choose_by_a_score_chooses_nothing():
    fit = fitted(Scripted(5, 4, 3, 2, 1), choose_by="loss")
    plain = gpt2.fit(
        model_of(adapter=True), DATA, CONFIG, validation=ASKED, run=RunConfig(eval_every=2)
    )
    losses = [record.validation for record in plain]
    assert (fit.best_step, fit.evaluated) == (plain.best_step, plain.evaluated)
    assert weights(fit.model) == weights(plain.model)
    assert any(losses)


def test_a_resumed_run_knows_the_scores_of_before(tmp_path):
    def score(texts, references):
        return float(len({*"".join(texts)}))

    whole = fitted(score, folder=tmp_path / "whole")
    fitted(score, steps=5, folder=tmp_path / "cut").save()
    resumed = fitted(score, folder=tmp_path / "cut", resume=True)
    assert resumed.scores == whole.scores
    assert resumed.best_step == whole.best_step
    assert weights(resumed.model) == weights(whole.model)
    with pytest.raises(ValueError, match="chosen by was score, 3 prompts scored, is loss"):
        fitted(score, folder=tmp_path / "cut", resume=True, choose_by="loss")


def scored_by_a_share() -> tuple[list[str], float]:
    scorer = Scorer(ASKED, gpt2.exact_match)
    return scorer.texts(model_of()), scorer(model_of())


def test_several_processes_share_the_prompts_and_have_all_texts():
    alone = scored_by_a_share()
    assert together(2, scored_by_a_share) == [alone, alone]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": gpt2.exact_match, "validation": None}, "score need validation data"),
        ({"choose_by": "score"}, 'choose_by is "loss", or "score" with a score'),
        ({"score": gpt2.exact_match, "choose_by": "bleu"}, "not 'bleu'"),
        ({"score": gpt2.exact_match, "validation": DATA}, "examples with a prompt"),
    ],
)
def test_a_fit_that_cannot_be_scored_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        gpt2.fit(model_of(), DATA, CONFIG, **{"validation": ASKED} | options)


def test_another_model_than_a_gpt2_is_refused():
    with pytest.raises(ValueError, match="takes a GPT-2, got Logits"):
        evaluate(Logits(model_of()), ASKED, score=gpt2.exact_match)


def test_a_prompt_that_fills_the_context_is_continued_as_far_as_there_is_room():
    word = "a" * (STILL.block_size - 1)
    data = encode([Example(word, "b"), Example("x", "yzabc")], Letters(), eos=False)
    model = model_of()
    texts = Scorer(data, gpt2.exact_match).texts(model)
    rooms = [1, 5]
    for prompt, made, room in zip((word, "x"), texts, rooms, strict=True):
        config = gpt2.GenerateConfig(max_new_tokens=room)
        with torch.no_grad():
            row = gpt2.generate(model, [Letters().encode(prompt)], config)[0]
        assert made == gpt2.Tokenizer().decode(row)
