"""The loss on held-out examples, and which examples are held out."""

from __future__ import annotations

import math

import pytest
import torch

import gpt2
import gpt2.fast.head
from gpt2 import IGNORE, Example, encode, evaluate
from gpt2.data.dataset import without_overlap
from gpt2.data.examples import is_within
from tests.runs import DATA, Letters, model_of, modes, weights
from tests.toys import split


def by_hand(model: gpt2.GPT2) -> tuple[float, int]:
    """Each token's loss by itself, in float64."""
    model, total, tokens = model.double().eval(), 0.0, 0
    for ids, labels in DATA:
        with torch.no_grad():
            found = model(ids[None])[0].log_softmax(-1)
        for t in range(len(ids) - 1):
            if labels[t + 1] != IGNORE:
                total -= float(found[t, labels[t + 1]])
                tokens += 1
    return total / tokens, tokens


def test_the_loss_is_the_mean_over_tokens():
    found = evaluate(model_of(), DATA)
    want, tokens = by_hand(model_of())
    assert found.loss == pytest.approx(want, rel=1e-6)
    assert (found.tokens, found.examples) == (tokens, len(DATA))
    assert found.perplexity == math.exp(found.loss)


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "an adapter"])
def test_the_batch_size_changes_rounding_only(adapter):
    model = model_of(dropout=True, adapter=adapter)
    found = [evaluate(model, DATA, batch_size=size) for size in (1, 2, 3, 8, 100)]
    assert {(f.tokens, f.examples) for f in found} == {(found[0].tokens, len(DATA))}
    for other in found[1:]:
        assert other.loss == pytest.approx(found[0].loss, rel=1e-6)


def test_modes_gradients_and_random_numbers_are_left_alone():
    model = model_of(dropout=True, adapter=True).eval()
    model.transformer.h[0].train()
    before, values = modes(model), weights(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    first = evaluate(model, DATA)
    assert torch.equal(torch.rand(4), want)
    assert modes(model) == before
    assert weights(model) == values
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert evaluate(model, DATA) == first  # without dropout
    model.transformer.h[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, DATA)
    assert modes(model) == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "an adapter"])
def test_logits_are_held_for_a_few_positions_at_a_time(adapter, monkeypatch):
    """Also where the head is trained, since no gradient is asked for."""
    monkeypatch.setattr(gpt2.fast.devices, "positions_at_a_time", lambda device: 8)
    seen: list[int] = []
    real = gpt2.fast.head._in_slices
    monkeypatch.setattr(
        gpt2.fast.head,
        "_in_slices",
        lambda hidden, *rest: (seen.append(len(hidden)), real(hidden, *rest))[1],
    )
    want = evaluate(model_of(adapter=adapter), DATA, batch_size=1)
    seen.clear()
    found = evaluate(model_of(adapter=adapter), DATA, batch_size=8)
    assert max(seen) == 8
    assert found.loss == pytest.approx(want.loss, rel=1e-6)


def test_autocast_is_near():
    model = model_of(adapter=True)
    want, got = evaluate(model, DATA), evaluate(model, DATA, autocast=True)
    assert got.loss != want.loss
    assert got.loss == pytest.approx(want.loss, rel=3e-2)


def test_a_loss_past_a_float_is_infinite_perplexity():
    assert gpt2.Evaluation(loss=1e4, tokens=1, examples=1).perplexity == math.inf
    assert math.isnan(gpt2.Evaluation(loss=math.nan, tokens=1, examples=1).perplexity)


def test_what_cannot_be_evaluated_is_refused():
    with pytest.raises(ValueError, match="must be a gpt2.Dataset, got list"):
        evaluate(model_of(), ["a"])
    with pytest.raises(ValueError, match="has 40 tokens .* takes 32"):
        evaluate(model_of(), encode(["a" * 39], Letters()))


# Held out

MANY = [Example(f"prompt {i // 2}", f"completion {i}") for i in range(2000)]


def test_no_prompt_is_on_both_sides():
    learnt, held_out = split(MANY, 0.1)
    assert not {e.prompt for e in learnt} & {e.prompt for e in held_out}
    assert sorted([*learnt, *held_out], key=MANY.index) == MANY
    assert 0.07 < len(held_out) / len(MANY) < 0.13
    assert split(MANY[::-1], 0.1)[1] == held_out[::-1]  # whatever stands around


def test_a_larger_share_holds_the_smaller_one():
    small, large = (set(split(MANY, share)[1]) for share in (0.1, 0.3))
    assert small < large


def test_texts_are_told_apart_by_what_they_say():
    texts = [Example("", f"text {i}") for i in range(200)]
    learnt, held_out = split(texts, 0.5)
    assert 60 < len(held_out) < 140
    assert is_within(held_out[0], (0, 0.5))
    assert not is_within(learnt[0], (0, 0.5))


def test_a_share_that_leaves_no_example_is_refused():
    with pytest.raises(ValueError, match="of 2 examples.* leaves none to evaluate on"):
        split(MANY[:2], 1e-9)
    with pytest.raises(ValueError, match="leaves none to learn"):
        split(MANY[:2], 1 - 1e-9)


def test_what_is_learnt_is_not_evaluated_on():
    def data(examples: list[Example]) -> gpt2.Dataset:
        return encode(examples, Letters(), answer_only=True)

    kept = without_overlap(data(MANY[:6]), data(MANY[4:]))
    assert [(a.tolist(), b.tolist()) for a, b in kept] == [
        (a.tolist(), b.tolist()) for a, b in data(MANY[:4])
    ]
    with pytest.raises(ValueError, match="Every validation example"):
        without_overlap(data(MANY[:2]), data(MANY))
    texts = [Example("", f"text {i}") for i in range(9)]
    assert len(without_overlap(data(texts), data(texts[3:]))) == 3


# Exact match


def answered(model: gpt2.GPT2, examples: list[Example]) -> float:
    """The share of prompts to which generating gives a reference and its end."""
    prompts: dict[str, list[list[int]]] = {}
    for e in examples:
        prompts.setdefault(e.prompt, []).append([*Letters().encode(e.completion), Letters().eos])
    exact = 0
    for prompt, wanted in prompts.items():
        longest = max(map(len, wanted))
        config = gpt2.GenerateConfig(max_new_tokens=longest, eos=(Letters.eos,))
        (found,) = gpt2.generate(model, [Letters().encode(prompt)], config)
        exact += [*found, Letters.eos] in wanted
    return exact / len(prompts)


@pytest.mark.parametrize("answer_only", [False, True])
def test_exact_match_is_that_of_greedy_completions(answer_only):
    model = model_of()
    examples = [Example(p, c) for p, c in (("ab", "cd"), ("ab", "xy"), ("ax", "f"), ("c", "gh"))]
    data = encode(examples, Letters(), answer_only=answer_only)
    for p in model.parameters():
        p.requires_grad_()
    assert evaluate(model, data).exact_match is None
    found = []
    for _ in range(4):
        list(gpt2.train(model, data, gpt2.TrainConfig(lr=0.01, steps=25, batch_size=4)))
        evaluations = [evaluate(model, data, batch_size=n, references=True) for n in (1, 3, 8)]
        assert len({e.exact_match for e in evaluations}) == 1
        assert evaluations[0].exact_match == answered(model, examples)
        compiled = torch.compile(model, backend="eager")
        assert evaluate(compiled, data, references=True).exact_match == evaluations[0].exact_match
        found.append(evaluations[0].exact_match)
    assert found[-1] == 1.0  # one of the two references of "ab" is enough


def test_a_text_as_a_whole_is_no_reference():
    with pytest.raises(ValueError, match="no example has one"):
        evaluate(model_of(), encode(["abc"], Letters()), references=True)
    data = encode([Example("", "abc"), Example("a", "b")], Letters())
    assert evaluate(model_of(), data, references=True).exact_match in (0.0, 1.0)
    cut = encode([Example("abcde", "f")], Letters(), max_length=4)  # nothing of the completion
    assert evaluate(model_of(), cut, references=True).exact_match == 0.0
