"""Halving: who goes on, and how far; what seeds can tell apart. Nothing here trains."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st


def test_the_best_of_each_rung_go_on_whatever_the_losses(script):
    check = given(st.data())(lambda data: goes_on(script("tuner.halving").Halving, data))
    check()


def goes_on(kind, data):
    keep, rungs = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 4))
    least = keep ** (rungs - 1)
    trials, total = data.draw(st.integers(least, 300)), data.draw(st.integers(least, 5000))
    plan = kind(trials=trials, rungs=rungs, keep=keep)
    assert plan.faults(total, 1) == []
    alive = plan.alive
    assert alive[0] == trials
    assert all(0 < after <= before for before, after in pairwise(alive))
    steps = [plan.step(rung, total) for rung in range(rungs)]
    assert steps[-1] == total
    assert steps[0] >= 1
    assert steps == sorted({*steps}), "every rung takes a step"
    copies = [max(1, steps[rung] // 8) for rung in range(rungs - 1)] + [0]
    assert [plan.cooldown_steps(rung, total) for rung in range(rungs)] == copies
    assert sum(plan.steps(rung, total) for rung in range(rungs)) == total + sum(copies)
    assert kind(trials=trials, rungs=rungs, keep=keep, cooldown=0).cooldown_steps(0, total) == 0
    for step, rung in zip(steps, range(rungs), strict=True):  # the share, to less than a step
        assert 0 <= total / keep ** (rungs - 1 - rung) - step < 1
    loss = st.one_of(st.floats(0, 9), st.just(math.nan), st.just(math.inf))
    losses = dict(enumerate(data.draw(st.lists(loss, min_size=trials, max_size=trials))))
    for rung in range(rungs):
        on = plan.survivors(losses, rung)
        finite = {n for n, value in losses.items() if math.isfinite(value)}
        room = alive[rung + 1] if rung + 1 < rungs else trials
        assert len(on) == min(room, len(finite))
        assert {*on} <= finite
        assert [losses[n] for n in on] == sorted(losses[n] for n in on)
        assert all(losses[n] >= losses[on[-1]] for n in finite - {*on})
        assert plan.survivors(dict(reversed(losses.items())), rung) == on, "in whatever order told"
        losses = {n: losses[n] for n in on}


def test_the_article_size_search_halves_as_the_issue_counts(script):
    plan = script("tuner.halving").Halving(trials=512, rungs=4, keep=4)
    assert plan.alive == [512, 128, 32, 8]
    assert [plan.step(rung, 2500) for rung in range(4)] == [39, 156, 625, 2500]


@pytest.mark.parametrize(
    ("numbers", "least", "finalists", "said"),
    [
        ((16, 4, 4), 63, 1, "take 64 steps and there are 63: at most 3 fit"),
        ((7, 3, 3), 100, 1, "7 trials leave none for the last of 3 rungs"),
        ((16, 2, 4), 100, 5, "there are 5 finalists, and 4 in the last rung"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(script, numbers, least, finalists, said):
    names = ("trials", "rungs", "keep")
    plan = script("tuner.halving").Halving(**dict(zip(names, numbers, strict=True)))
    assert said in "; ".join(plan.faults(least, finalists))


def test_seeds_tell_apart_what_differs_by_more_than_their_noise(script):
    outcome = script("tuner.outcome")
    base = [1.00, 1.10, 0.95, 1.05]
    assert outcome.differ([x + 0.05 for x in base], base), "the same seeds, the same difference"
    assert not outcome.differ([1.05, 1.02, 1.01, 1.03], base)
    assert not outcome.differ([2.0], [1.0]), "one seed has no noise to compare with"
    # by hand: differences 0.1, 0.2, 0.3: mean 0.2, error 0.1 / √3 = 0.0577, t 4.303: 0.248
    assert not outcome.differ([1.1, 1.2, 1.3], [1.0, 1.0, 1.0])
    assert outcome.differ([1.15, 1.2, 1.25], [1.0, 1.0, 1.0])
    assert outcome.differ([1.0, math.nan], [1.0, 1.1]), "one that ended and one that did not"
