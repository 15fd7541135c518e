"""A run with validation, the best kept, early stop and snapshots."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

import gpt2
import lora
from gpt2 import RunConfig, TrainConfig, encode, evaluate, fit
from gpt2.training import fitting, snapshots
from gpt2.training.fitting import since_lowest
from gpt2.training.step import AdamW
from tests.runs import DATA, HELD_OUT, STILL, Letters, model_of, timeless, weights
from tests.toys import raw, tiny_gpt2

CONFIG = TrainConfig(lr=1e-2, steps=12, batch_size=3)


def fitted(model: nn.Module, config: TrainConfig = CONFIG, **options) -> gpt2.Fit:
    run = RunConfig(**{"eval_every": 2} | options)
    return fit(model, DATA, config, validation=HELD_OUT, run=run)


def outcome(run: gpt2.Fit) -> tuple:
    """All that must be equal to the bit: weights, moments, best, evaluations."""
    state = run.state()
    with run.last_weights():
        last = weights(run.model)
    moments = {name: raw(tensor) for name, tensor in state.moments.items()}
    best = {name: raw(tensor) for name, tensor in run.best.items()}
    return last, moments, best, run.evaluated, run.best_step


@pytest.mark.parametrize(
    ("stops", "options"),
    [
        *[((stop,), {}) for stop in (1, 2, 5, 9)],
        ((3, 7), {"adapter": False}),
        ((4,), {"batch_size": 3, "accumulate": 2}),
        ((4,), {"tokens_per_batch": 16, "batch_size": 1}),
        ((4,), {"tokens_per_batch": 16, "batch_size": 1, "packing": True}),
        ((4,), {"batch_size": 2, "label_smoothing": 0.1, "warmup_steps": 3}),
    ],
    ids=str,
)
def test_a_resumed_run_equals_one_that_never_stopped(stops, options, tmp_path):
    """Also where it is saved right after it was resumed, as by Ctrl-C before its first step."""
    adapter = options.get("adapter", True)
    config = replace(CONFIG, **{k: v for k, v in options.items() if k != "adapter"})
    whole = fitted(model_of(dropout=True, adapter=adapter), config)
    want = list(whole)
    part = fitted(model_of(True, adapter), config, save_every=1, folder=tmp_path)
    got: list[gpt2.StepRecord] = []
    for stop in stops:
        got += islice(part, stop - len(got))
        next(part)  # for which the caller does not come back
        for _ in range(2):
            model = model_of(True, adapter)
            nn.init.zeros_(next(p for p in model.parameters() if p.requires_grad))
            part = resumed(tmp_path, model=model, config=config, save_every=1)
            assert part.save()
        del got[part.start - 1 :]
    got += part
    assert timeless(got) == timeless(want)
    assert outcome(part) == outcome(whole)


def test_resuming_is_more_than_loading_the_weights(tmp_path):
    whole = list(fitted(model_of(dropout=True, adapter=True)))
    first = fitted(model_of(dropout=True, adapter=True), folder=tmp_path, save_every=1)
    for _ in range(6):
        next(first)
    snapshot = snapshots.read(tmp_path)
    assert snapshot.step == 5
    run = fitted(model_of(dropout=True, adapter=True), folder=tmp_path)
    run.resume(replace(snapshot, moments={}))
    losses = [record.loss for record in run]
    assert losses[0] == whole[5].loss
    assert losses[1:] != [r.loss for r in whole[6:]]


def test_evaluations_and_snapshots_are_of_their_own_step(tmp_path):
    run = fitted(model_of(adapter=True), eval_every=3, folder=tmp_path, save_every=4)
    saved = [snapshots.read(tmp_path).step for r in run if r.step % 4 == 1 and r.step > 1]
    assert list(run.evaluated) == [0, 3, 6, 9, 12]
    assert saved == [4, 8]


@pytest.mark.parametrize("within", ["evaluation", "the caller"])
def test_an_interrupt_loses_no_record(within, tmp_path, monkeypatch):
    """Nor the evaluation of the step that it came after."""
    want = list(whole := fitted(model_of(dropout=True, adapter=True)))
    first = fitted(model_of(dropout=True, adapter=True), folder=tmp_path)
    got = [next(first) for _ in range(3)]
    if within == "evaluation":
        with monkeypatch.context() as patch:
            patch.setattr(fitting, "evaluate", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                next(first)
    else:
        next(first)
    assert first.save()
    run = RunConfig(eval_every=2, folder=tmp_path)
    model = model_of(dropout=True, adapter=True)
    again = fit(model, DATA, CONFIG, validation=HELD_OUT, run=run, resume=True)
    assert (again.taken, again.start) == (4, 4)
    got += again
    assert timeless(got) == timeless(want)
    assert outcome(again) == outcome(whole)


def test_a_folder_for_snapshots_is_made(tmp_path):
    list(fitted(model_of(adapter=True), folder=tmp_path / "a" / "new", save_every=4))
    assert snapshots.read(tmp_path / "a" / "new").step == 12


def test_no_snapshot_is_made_of_half_an_update(tmp_path, monkeypatch):
    run = fitted(model_of(), folder=tmp_path)
    next(run)
    real = AdamW.step

    def stopped(self, *args, **kwargs):
        real(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(AdamW, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        next(run)
    assert not run.save()
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="in the midst of an update"):
        run.state()


# Validation


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([5.0, 4.0, 3.0, 2.0, 3.0, 2.0, 4.0], 6),  # the first of two equal ones
        ([NAN, 3.0, NAN, 2.0, NAN, INF, NAN], 6),
        ([NAN] * 7, None),
    ],
)
def test_the_best_is_what_the_model_has_at_the_end(losses, best, monkeypatch):
    given = iter(losses)
    fake = lambda *_, **__: gpt2.Evaluation(loss=next(given), tokens=1, examples=1)  # noqa: E731
    monkeypatch.setattr(fitting, "evaluate", fake)
    model = model_of(dropout=True, adapter=True)
    run = fitted(model)
    seen = {r.step: weights(model) for r in run}
    assert str(run.evaluated) == str(dict(zip(range(0, 13, 2), losses, strict=True)))
    assert run.best_step == best
    assert weights(model) == seen[best or 12]  # the last, where none is the best
    with run.last_weights():
        assert weights(model) == seen[12]
    with run.best_weights():
        assert weights(model) == seen[best or 12]
    assert weights(model) == seen[best or 12]
    assert list(run) == []  # a run is over once


def test_the_base_is_evaluated_before_the_first_step():
    model = model_of(adapter=True)
    want = evaluate(model, HELD_OUT).loss
    run = fitted(model)
    next(run)
    assert run.evaluated[0] == pytest.approx(want, rel=1e-6)
    assert [r.validation is not None for r in run] == [True, False] * 5 + [True]


def test_evaluations_and_snapshots_change_no_step(tmp_path):
    plain, watched = model_of(dropout=True), model_of(dropout=True)
    want = list(gpt2.train(plain, DATA, CONFIG))
    run = fitted(watched, eval_every=1, save_every=1, folder=tmp_path)
    assert [(r.loss, r.grad_norm) for r in run] == [(r.loss, r.grad_norm) for r in want]
    with run.last_weights():
        assert weights(watched) == weights(plain)


def test_without_validation_the_last_weights_are_the_result(tmp_path):
    plain, kept = model_of(), model_of()
    want = list(gpt2.train(plain, DATA, CONFIG))
    got = list(fit(kept, DATA, CONFIG, run=RunConfig(folder=tmp_path, save_every=3)))
    assert [r.loss for r in got] == [r.loss for r in want]
    assert weights(kept) == weights(plain)
    assert [file.name for file in tmp_path.iterdir()] == [snapshots.NAME]


@pytest.mark.parametrize(
    ("losses", "want"),
    [
        ([], 0),
        ([3.0], 0),
        ([3.0, 2.0, 2.5, 2.0], 2),
        ([NAN, NAN], 2),
        ([3.0, NAN, 2.0, NAN], 1),
        ([INF, 2.0], 0),
    ],
)
def test_patience_counts_evaluations_without_a_lower_loss(losses, want):
    assert since_lowest(losses) == want


@pytest.mark.parametrize("stop", [None, 3, 5])
def test_patience_stops_a_run_and_survives_a_resume(stop, monkeypatch, tmp_path):
    losses = {0: 5.0, 2: 4.0, 4: 4.5, 6: 4.2, 8: 4.1, 10: 1.0, 12: 1.0}
    at = lambda: next(step for step in losses if step not in run.evaluated)  # noqa: E731
    fake = lambda *_, **__: gpt2.Evaluation(loss=losses[at()], tokens=1, examples=1)  # noqa: E731
    monkeypatch.setattr(fitting, "evaluate", fake)
    options = {"patience": 3, "folder": tmp_path, "save_every": 1}
    run = fitted(model_of(adapter=True), **options)
    if stop:
        for _ in range(stop):
            next(run)
        config = RunConfig(eval_every=2, **options)
        model = model_of(adapter=True)
        run = fit(model, DATA, CONFIG, validation=HELD_OUT, run=config, resume=True)
    *_, last = run
    assert last.step == 8
    assert run.best_step == 2


# Snapshots


def begun(tmp_path: Path, dropout: bool = False) -> Path:
    """A folder with a snapshot of step 5."""
    run = fitted(model_of(dropout, adapter=True), folder=tmp_path, save_every=1)
    for _ in range(6):
        next(run)
    return tmp_path


def resumed(tmp_path: Path, **changed) -> gpt2.Fit:
    options = {"save_every": changed.pop("save_every", None)}
    given = {"model": model_of(adapter=True), "data": DATA, "config": CONFIG} | changed
    validation = given.pop("validation", HELD_OUT)
    run = RunConfig(eval_every=2, folder=tmp_path, **options)
    return fit(**given, validation=validation, run=run, resume=True)


def test_a_damaged_snapshot_is_refused_in_a_line(tmp_path):
    file = begun(tmp_path) / snapshots.NAME
    content = file.read_bytes()
    other = content.replace(b'\\"format\\": 3', b'\\"format\\": 2')
    assert other != content
    for damaged in (*(content[:length] for length in (0, 7, 300, len(content) - 1)), other):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"snapshot.safetensors cannot be read .*: train anew"):
            resumed(tmp_path)


def test_an_empty_folder_cannot_be_resumed(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no snapshot"):
        resumed(tmp_path)


def other_base() -> nn.Module:
    model = model_of(adapter=True)
    with torch.no_grad():
        model.transformer.wte.weight[3, 3] += 1e-3
    return model


def other_dropout() -> nn.Module:
    model = gpt2.GPT2(replace(STILL, attn_pdrop=0.2))  # which no module shows
    model.load_state_dict(tiny_gpt2(0).state_dict())
    lora.inject(model, r=4, dropout=0.0, seed=0)
    return model


def wider() -> nn.Module:
    model = model_of()
    lora.inject(model, r=5, seed=0)
    return model


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"data": encode(["abc", "hello"], Letters())}, "data was 8 examples.*is 2 examples"),
        ({"validation": encode(["abc"], Letters())}, "validation data was 4 examples"),
        ({"validation": None}, "validation data was 4 .*is none"),
        ({"config": replace(CONFIG, lr=2e-2)}, r"lr was 0\.01, is 0\.02"),
        (
            {"config": replace(CONFIG, seed=1, steps=13)},
            r"steps was 12, is 13; .*seed was 42, is 1",
        ),
        ({"model": other_base()}, "base was"),
        ({"model": other_dropout()}, "modules was"),
        ({"model": wider()}, "trained parameters was"),
        ({"model": model_of()}, "trained parameters was"),
        ({"model": model_of(dropout=True, adapter=True)}, "modules was"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_another_run_cannot_be_resumed(changed, said, tmp_path):
    if changed.get("validation", HELD_OUT) is None:
        with pytest.raises(ValueError, match="need validation data"):
            resumed(begun(tmp_path), **changed)
        return
    with pytest.raises(ValueError, match=f"cannot be resumed: .*{said}"):
        resumed(begun(tmp_path), **changed)


def test_other_groups_cannot_be_resumed(tmp_path):
    model, run = model_of(adapter=True), RunConfig(folder=tmp_path, save_every=1)
    first = fit(model, DATA, CONFIG, run=run, groups=lora.parameter_groups(model, lr=1e-3))
    for _ in range(3):
        next(first)
    other = model_of(adapter=True)
    faster = lora.parameter_groups(other, lr=1e-3, b_ratio=4)
    for groups, said in ((None, "group 1 was .*, is gone"), (faster, "group 1 was .*, is .*0.004")):
        with pytest.raises(ValueError, match=f"cannot be resumed: .*{said}"):
            fit(other, DATA, CONFIG, run=run, groups=groups, resume=True)
    same = lora.parameter_groups(other, lr=1e-3)
    assert fit(other, DATA, CONFIG, run=run, groups=same, resume=True).taken == 2


def test_a_torch_that_prints_modules_otherwise_resumes(tmp_path, monkeypatch):
    begun(tmp_path)
    monkeypatch.setattr(nn.Dropout, "extra_repr", lambda self: f"rate={self.p}")
    monkeypatch.setattr(nn.Module, "__repr__", lambda self: "a module")
    assert resumed(tmp_path).taken == 5


def test_a_full_disk_lets_the_run_go_on_and_the_snapshot_before_stay(tmp_path, monkeypatch):
    want = list(fitted(model_of(adapter=True)))
    run = fitted(model_of(adapter=True), folder=tmp_path, save_every=1)
    got = [next(run) for _ in range(4)]
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(before) == 1
    with monkeypatch.context() as patch:

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(os, "fsync", full)
        with pytest.warns(RuntimeWarning, match=r"step 4 could not .*No space.* run goes on"):
            got.append(next(run))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    got += run
    assert [r.loss for r in got] == [r.loss for r in want]
    assert snapshots.read(tmp_path).step == 12


BAD_RUNS = {
    "eval_every must be an integer of at least 1": [{"eval_every": 0}],
    "patience must be an integer of at least 1": [{"patience": 0}],
    "save_every must be an integer of at least 1": [{"save_every": 0, "folder": "a"}],
    "save_every needs a folder": [{"save_every": 1}],
}


@pytest.mark.parametrize("said", BAD_RUNS)
def test_a_bad_run_config_is_refused(said):
    for options in BAD_RUNS[said]:
        with pytest.raises(ValueError, match=f"^RunConfig: .*{said}"):
            RunConfig(**options)


def test_patience_without_validation_is_refused():
    for options in ({"patience": 1}, {"eval_every": 1}):
        with pytest.raises(ValueError, match="need validation data"):
            fit(model_of(), DATA, CONFIG, run=RunConfig(**options))
    with pytest.raises(ValueError, match="name the folder"):
        fit(model_of(), DATA, CONFIG, resume=True)


def test_a_run_killed_at_random_equals_one_that_never_was():
    """The short form; `python -m tests.kill_and_resume --kills 200` is the long one."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_and_resume", "--kills", "6", "--seed", "1"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kills"] == 6
