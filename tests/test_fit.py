"""A run with validation, the best kept, early stop and snapshots."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import gpt2
from gpt2 import RunConfig, TrainConfig, encode, fit
from tests.test_train import DATA, Letters, model_of, weights
from tests.toys import raw

HELD_OUT = encode(["abd", "hallo", "lowtank", "as"], Letters())
CONFIG = TrainConfig(lr=1e-2, steps=12, batch_size=3)


@pytest.fixture(autouse=True)
def _one_thread(_two_threads: None) -> None:
    torch.set_num_threads(1)


def fitted(model: nn.Module, config: TrainConfig = CONFIG, **options) -> gpt2.Fit:
    run = RunConfig(**{"eval_every": 2} | options)
    return fit(model, DATA, config, validation=HELD_OUT, run=run)


def outcome(run: gpt2.Fit) -> tuple:
    """All that must be equal to the bit: weights, moments, best, evaluations."""
    state = run.training.run.state()
    with run.last_weights():
        last = weights(run.model)
    moments = {name: raw(tensor) for name, tensor in state.moments.items()}
    best = {name: raw(tensor) for name, tensor in run._kept.best.items()}
    return last, moments, best, run.evaluated, run.best_step


@pytest.mark.parametrize("stop", [1, 2, 5, 9])
def test_a_resumed_run_equals_one_that_never_stopped(stop, tmp_path):
    whole = fitted(model_of(dropout=True, adapter=True))
    want = list(whole)
    first = fitted(model_of(dropout=True, adapter=True), save_every=1, folder=tmp_path)
    got = [next(first) for _ in range(stop + 1)]  # the last is not told yet
    run = RunConfig(eval_every=2, folder=tmp_path)
    second = model_of(dropout=True, adapter=True)
    nn.init.zeros_(next(p for p in second.parameters() if p.requires_grad))
    again = fit(second, DATA, CONFIG, validation=HELD_OUT, run=run, resume=True)
    rest = list(again)
    assert [replace(r, seconds=0) for r in [*got[:stop], *rest]] == [
        replace(r, seconds=0) for r in want
    ]
    assert outcome(again) == outcome(whole)
