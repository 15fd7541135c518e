"""The training loop: its arithmetic, its schedule, its determinism, and how it ends."""

from __future__ import annotations

import copy
import gc
import math
import shutil
import sys
import weakref
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

import gpt2
import gpt2.fast.head
import lora
from gpt2 import TrainConfig, batches, encode, next_token_loss, total_steps, train
from gpt2.training.config import lr_scale
from gpt2.training.loop import StepRecord
from gpt2.training.step import Stepper
from tests.runs import DATA, STILL, Letters, model_of, modes, run, timeless, weights
from tests.toys import TINY, raw


def assert_alike(model: nn.Module, other: nn.Module) -> None:
    """Equal in what they say: a key's bias has no effect, so its gradient is rounding alone, which
    Adam makes a step of."""
    idx = torch.arange(TINY.block_size)[None]
    torch.testing.assert_close(model.eval()(idx), other.eval()(idx), rtol=1e-3, atol=1e-3)


# The arithmetic of a step


def by_hand(model: nn.Module, config: TrainConfig, total: int) -> list[tuple[float, float]]:
    """The textbook loop: mean loss of each whole batch, clip, AdamW, transformers' schedule."""
    transformers = pytest.importorskip("transformers")
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
    schedule = transformers.get_scheduler(config.schedule, optimizer, 0, total)
    figures: list[tuple[float, float]] = []
    for epoch in range(total):
        for batch in batches(DATA, config.batch_size, seed=config.seed, epoch=epoch):
            optimizer.zero_grad()
            loss = next_token_loss(model(batch.idx), batch.labels)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(trained, config.clip or math.inf)
            optimizer.step()
            schedule.step()
            figures.append((loss.item(), norm.item()))
            if len(figures) == total:
                return figures
    return figures


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "an adapter"])
@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "constant"},
        {"batch_size": 3, "weight_decay": 0.3, "clip": None},
        {"batch_size": 2, "schedule": "cosine", "clip": 0.05},
    ],
    ids=str,
)
def test_a_run_is_the_textbook_loop(options, adapter):
    ours, theirs = model_of(adapter=adapter), model_of(adapter=adapter)
    config = TrainConfig(lr=1e-2, steps=12, **options)
    records = list(train(ours, DATA, config))
    want = by_hand(theirs, config, 12)
    for record, (loss, norm) in zip(records, want, strict=True):
        assert record.loss == pytest.approx(loss, rel=1e-4)
        assert record.grad_norm == pytest.approx(norm, rel=1e-3)
    assert_alike(ours, theirs)


def test_accumulating_is_one_large_batch():
    """Rows of two to eight tokens: a mean of the micro-batches' means would be another number."""
    at_once, in_parts = model_of(), model_of()
    want = run(at_once, batch_size=4, steps=3)
    got = run(in_parts, batch_size=1, accumulate=4, steps=3)
    for a, b in zip(got, want, strict=True):
        assert (a.step, a.epoch, a.tokens, a.lr) == (b.step, b.epoch, b.tokens, b.lr)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
    assert_alike(in_parts, at_once)


def test_only_what_requires_grad_changes():
    model = model_of(adapter=True)
    before = weights(model)
    run(model)
    after = weights(model)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "an adapter"])
def test_autocast_is_near_float32_and_keeps_the_weights_in_it(adapter):
    exact, fast = model_of(adapter=adapter), model_of(adapter=adapter)
    want, got = run(exact), run(fast, autocast=True)
    assert [r.loss for r in got] != [r.loss for r in want]
    assert [r.loss for r in got] == pytest.approx([r.loss for r in want], rel=3e-2)
    assert {p.dtype for p in fast.parameters()} == {torch.float32}


def test_checkpointing_changes_nothing_but_memory():
    plain, frugal = model_of(dropout=True, adapter=True), model_of(dropout=True, adapter=True)
    born = weights(frugal)
    passes = [0, 0]
    for i, model in enumerate((plain, frugal)):
        block = model.transformer.h[0].mlp.c_fc
        block.register_forward_hook(lambda *_, i=i: passes.__setitem__(i, passes[i] + 1))
    assert run(frugal, checkpointing=True)[-1].loss == run(plain)[-1].loss
    assert weights(frugal) == weights(plain)
    trained = [name for name, p in frugal.named_parameters() if p.requires_grad]
    assert [name for name in trained if weights(frugal)[name] == born[name]] == []
    assert passes == [6, 12]  # each block runs again in the backward pass
    assert "forward" not in vars(frugal.transformer.h[0])


def test_compiling_changes_no_loss():
    if not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("torch.compile needs a C++ compiler here")
    config = replace(STILL, n_layer=1)
    eager, compiled = gpt2.GPT2(config), gpt2.GPT2(config)
    compiled.load_state_dict(eager.state_dict())
    for model in (eager, compiled):
        lora.inject(model, r=2, seed=0)
    data = encode(["compile"], Letters())  # one shape
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    want, got = run(eager, data, steps=3), run(compiled, data, steps=3, compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()
    assert [r.loss for r in got] == pytest.approx([r.loss for r in want], rel=1e-5)
    assert [r.grad_norm for r in got] == pytest.approx([r.grad_norm for r in want], rel=1e-4)


def test_a_compiled_run_has_few_shapes_and_never_exceeds_the_context(monkeypatch):
    """Whatever the lengths and however many examples the last batch of an epoch has."""
    for module in (gpt2.fast.compiling, gpt2.fast.head):
        monkeypatch.setattr(module, "compiled", lambda function: function)
    model = gpt2.GPT2(replace(STILL, n_layer=1, n_embd=8, block_size=200))
    data = encode(["a" * n for n in range(2, 200)], Letters())
    shapes: set[tuple[int, ...]] = set()
    model.transformer.h[0].register_forward_pre_hook(lambda _, inputs: shapes.add(inputs[0].shape))
    run(model, data, steps=len(data), batch_size=4, compile=True)
    assert (4, 200, 8) in shapes
    assert shapes <= {(4, T, 8) for T in (32, 64, 96, 128, 192, 200)}


# Records and the schedule


def test_records_count_steps_epochs_and_tokens():
    records = run(model_of(), batch_size=3, epochs=2, steps=None)
    assert [r.step for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r.epoch for r in records] == [1, 1, 1, 2, 2, 2]
    per_epoch = DATA.n_tokens - len(DATA)  # the first token of a row is not predicted
    assert sum(r.tokens for r in records) == 2 * per_epoch
    assert records[0].seconds > 0
    assert [r.seconds for r in records] == sorted(r.seconds for r in records)


@pytest.mark.parametrize(("batch_size", "accumulate", "steps"), [(1, 1, 8), (3, 1, 3), (3, 2, 2)])
def test_epochs_are_whole(batch_size, accumulate, steps):
    config = TrainConfig(epochs=3, batch_size=batch_size, accumulate=accumulate)
    assert total_steps(DATA, config) == 3 * steps
    records = list(train(model_of(), DATA, config))
    assert [r.epoch for r in records] == [1] * steps + [2] * steps + [3] * steps


def test_reading_each_record_at_once_or_at_the_end_gives_the_same():
    late, at_once = model_of(), model_of()
    got = run(late)
    config = TrainConfig(lr=1e-2, steps=6)
    assert timeless(got) == timeless(list(train(at_once, DATA, config)))
    assert weights(late) == weights(at_once)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(
    "warmup",
    [{"warmup_ratio": ratio} for ratio in (0.0, 0.1, 0.33, 1.0)]
    + [{"warmup_steps": steps} for steps in (0, 1, 7, 25, 40)],
    ids=str,
)
def test_the_schedule_is_transformers(schedule, warmup):
    transformers = pytest.importorskip("transformers")
    total = 25
    config = TrainConfig(lr=3e-3, steps=total, schedule=schedule, **warmup)
    steps = warmup.get("warmup_steps", math.ceil(total * config.warmup_ratio))
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=3e-3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = transformers.get_scheduler(name, optimizer, steps, total)
    for step in range(1, total + 1):
        want = theirs.get_last_lr()[0]
        assert 3e-3 * lr_scale(step, total, config) == pytest.approx(want, rel=1e-12, abs=1e-18)
        optimizer.step()
        theirs.step()


def test_records_say_the_learning_rate_that_was_used():
    model = model_of()
    before = weights(model)
    steps = train(model, DATA, TrainConfig(lr=1e-2, steps=4, warmup_ratio=0.5))
    assert next(steps).lr == 0  # as transformers' first step of a warm-up
    assert weights(model) == before
    assert [record.lr for record in steps] == [5e-3, 1e-2, 5e-3]


# Determinism


def test_the_same_seed_gives_the_same_bytes_whatever_the_caller_draws_or_sets():
    one, other = model_of(dropout=True, adapter=True), model_of(dropout=True, adapter=True)
    torch.manual_seed(1)
    want = run(one)
    torch.manual_seed(2)
    got: list[StepRecord] = []
    for record in train(other, DATA, TrainConfig(lr=1e-2, steps=6)):
        got.append(record)
        torch.rand(record.step)
        torch.manual_seed(record.step)
        assert not any(modes(other.eval()))
    assert timeless(got) == timeless(want)
    assert weights(other) == weights(one)


def test_the_callers_random_numbers_are_left_alone():
    model = model_of(dropout=True)
    torch.manual_seed(3)
    want = torch.rand(7)
    torch.manual_seed(3)
    steps = train(model, DATA, TrainConfig(steps=6))
    got = [torch.rand(1) for _ in steps]
    assert torch.equal(torch.cat([*got, torch.rand(1)]), want)


def test_another_seed_gives_another_run():
    by_seed = [[r.loss for r in run(model_of(dropout=True), seed=seed)] for seed in (0, 1)]
    assert by_seed[0] != by_seed[1]


def test_dropout_differs_from_step_to_step():
    data = encode(["same"], Letters())
    losses = [r.loss for r in run(model_of(dropout=True), data, steps=4, lr=1e-12)]
    assert len(set(losses)) == 4


# How a run ends


def mixed() -> gpt2.GPT2:
    """A model of which one module is in another mode than the rest."""
    model = model_of(dropout=True).eval()
    model.transformer.h[0].mlp.train()
    return model


class StoppedError(Exception):
    pass


def stop_at(model: nn.Module, call: int, stop: type[BaseException]) -> None:
    """Raise in the midst of the model's nth forward pass."""
    calls = iter(range(1, 1000))

    def hook(*_: object) -> None:
        if next(calls) == call:
            raise stop

    model.transformer.h[1].register_forward_hook(hook)


@pytest.mark.parametrize("given_up", [False, True])
def test_between_steps_and_after_them_the_model_is_the_callers(given_up):
    """Every module is in its own mode there, so that a sample drawn from it has no dropout."""
    model = mixed()
    before, seen = modes(model), set[tuple[bool, ...]]()
    model.transformer.h[0].register_forward_hook(lambda *_: seen.add(tuple(modes(model))))
    steps = train(model, DATA, TrainConfig(steps=3, checkpointing=True))
    assert modes(model) == before
    for _ in islice(steps, 1 if given_up else 3):
        assert modes(model) == before
        assert "forward" not in vars(model.transformer.h[0])
    steps.close()
    assert modes(model) == before
    assert seen == {(True,) * len(before)}  # in a step, all train


@pytest.mark.parametrize("stop", [KeyboardInterrupt, StoppedError])
def test_a_stop_in_a_forward_pass_leaves_the_last_whole_step(stop):
    whole, stopped = mixed(), mixed()
    before = modes(stopped)
    run(whole, steps=2, accumulate=2, schedule="constant")
    stop_at(stopped, 6, stop)  # the second micro-batch of the third step
    records: list[StepRecord] = []
    randomness = torch.get_rng_state()
    with pytest.raises(stop):
        for record in train(
            stopped, DATA, TrainConfig(lr=1e-2, steps=6, accumulate=2, schedule="constant")
        ):
            records.append(record)
    assert [r.step for r in records] == [1, 2]
    assert weights(stopped) == weights(whole)
    assert modes(stopped) == before
    assert torch.equal(torch.get_rng_state(), randomness)


OURS = str(Path(gpt2.__file__).parent)
OPTIMISERS = str(Path(torch.optim.__file__).parent)


class Lines:
    """A tracer that counts the lines run in gpt2 and torch's optimisers, and stops at the nth."""

    def __init__(self, stop: int = 0) -> None:
        self.stop, self.seen = stop, 0

    def __call__(self, frame, event, _):
        if not frame.f_code.co_filename.startswith((OURS, OPTIMISERS)):
            return None
        self.seen += event == "line"
        if event == "line" and self.seen == self.stop:
            raise KeyboardInterrupt
        return self


def test_a_stop_at_any_line_leaves_a_whole_step():
    config = TrainConfig(lr=1e-2, steps=2, schedule="constant")
    data = encode(["stop"], Letters())
    base = gpt2.GPT2(replace(STILL, n_layer=1))
    lora.inject(base, r=2, seed=0)

    def trained(tracer: Lines | None, options: TrainConfig) -> tuple[dict[str, bytes], bool]:
        model, stopped = copy.deepcopy(base), False
        before = sys.gettrace()
        steps = train(model, data, options)
        sys.settrace(tracer)
        try:
            list(steps)
        except KeyboardInterrupt:
            stopped = True
        finally:
            sys.settrace(before)
            torch.set_grad_enabled(True)  # torch's optimiser may not have come to it
            steps.close()  # it may not have begun
        return weights(model), stopped

    whole = [weights(base), *(trained(None, replace(config, steps=n))[0] for n in (1, 2))]
    trained(lines := Lines(), config)
    reached = [
        whole.index(left)
        for line in range(1, lines.seen, 5)
        for left, stopped in [trained(Lines(line), config)]
        if stopped
    ]
    assert len(reached) == len(range(1, lines.seen, 5))
    assert reached == sorted(reached)
    assert set(reached) == {0, 1, 2}


def test_the_update_is_one_call(monkeypatch):
    calls: list[int] = []
    real = torch._fused_adamw_
    monkeypatch.setattr(
        torch, "_fused_adamw_", lambda p, *a, **k: (calls.append(len(p)), real(p, *a, **k))
    )
    run(model_of(), steps=2)
    assert calls == [len(list(model_of().parameters()))] * 2


@pytest.mark.parametrize("late", [False, True], ids=["read at once", "read at the end"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_before_it_does_harm(where, bad, late):
    """Steps after it, taken before anybody has looked, do nothing either."""
    whole, stopped = model_of(), model_of()
    before = modes(stopped)
    options = {"lr": 1e-2, "schedule": "constant"}
    run(whole, steps=3, **options)
    spoil(stopped, call=4, value=bad, where=where)
    records: list[StepRecord] = []
    steps = train(stopped, DATA, TrainConfig(steps=8, **options))
    with pytest.raises(RuntimeError, match=r"^Step 4: the loss or .* lower learning rate\.$"):
        for record in steps:
            records.append(record)
            assert late or record.loss
    assert [r.step for r in records] == list(range(1, 9 if late else 5))
    assert steps.taken == 3
    assert all(math.isfinite(r.loss + r.grad_norm) for r in records[:3])
    for record in records[3:]:
        with pytest.raises(RuntimeError, match="^Step 4: the loss or"):
            assert record.loss
    assert weights(stopped) == weights(whole)
    assert modes(stopped) == before


def test_records_that_nobody_read_hold_three_numbers_each():
    """No graph and no batch, nor the model once the run is over."""
    model = model_of()
    records = run(model, encode(["abc"], Letters()), steps=9)
    refs = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert not any(ref() for ref in refs)
    figures = [record.figures for record in records]
    assert [(f.shape, f.grad_fn, f.requires_grad) for f in figures] == [((3,), None, False)] * 9
    held = {type(value) for record in records for value in vars(record).values()}
    assert held == {int, float, torch.Tensor, type(None)}


def test_what_is_not_finite_leaves_the_optimiser():
    config = TrainConfig(lr=1e-2, steps=3)
    model = model_of().train()
    spoil(model, call=3, value=math.inf, where="gradient")
    stepper = Stepper(model, config)
    for step, batch in enumerate(islice(batches(DATA, 1, seed=0, epoch=0), 3), 1):
        state = stepper.optimizer.state_dict()["state"]
        before = [
            (key, raw(t.reshape(-1))) for moments in state.values() for key, t in moments.items()
        ]
        figures = stepper([batch], step)
    assert figures[0].isfinite()
    assert not figures[1].isfinite()
    state = stepper.optimizer.state_dict()["state"]
    after = [(key, raw(t.reshape(-1))) for moments in state.values() for key, t in moments.items()]
    assert len(after) == 3 * len(list(model.parameters()))
    assert after == before
    assert {float(moments["step"]) for moments in state.values()} == {2}


def spoil(model: nn.Module, *, call: int, value: float, where: str) -> None:
    """Make the hidden states, or only their gradient, hold a bad value in the nth pass."""
    calls = iter(range(1, 1000))

    def hook(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        if next(calls) != call:
            return output
        if where == "gradient":
            output.register_hook(lambda gradient: gradient * value)
            return output
        return output * value

    model.transformer.h[1].register_forward_hook(hook)


def test_a_run_after_a_stop_is_as_any_other():
    """Nothing of the stopped step is left: no gradient, no mode, no random state."""
    stopped, fresh = model_of(dropout=True), model_of(dropout=True)
    stop_at(stopped, 1, StoppedError)
    with pytest.raises(StoppedError):
        run(stopped, accumulate=2)
    for parameter in stopped.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert [r.loss for r in run(stopped)] == [r.loss for r in run(fresh)]
    assert weights(stopped) == weights(fresh)


# Bad input


@pytest.mark.parametrize("off", [lora.disabled, lora.merged])
def test_an_adapter_that_is_switched_off_cannot_be_trained(off):
    model = model_of(adapter=True).eval()
    with off(model), pytest.raises(RuntimeError, match="disabled or merged"):
        run(model)
    assert not model.training


A_COUNT = "{} must be an integer of at least {}, got {}"
BAD_OPTIONS = {
    "give epochs or steps, and not both": [{}, {"epochs": 1, "steps": 1}],
    A_COUNT.format("steps", 1, "(0|True)"): [{"steps": 0}, {"steps": True}],
    A_COUNT.format("epochs", 1, 1.5): [{"epochs": 1.5}],
    A_COUNT.format("batch_size", 1, "(0|None)"): [{"batch_size": 0}, {"batch_size": None}],
    A_COUNT.format("accumulate", 1, -1): [{"accumulate": -1}],
    A_COUNT.format("seed", 0, -1): [{"seed": -1}],
    A_COUNT.format("warmup_steps", 0, ".+"): [{"warmup_steps": -1}, {"warmup_steps": 1.5}],
    r"lr must be in \(0, inf\)": [{"lr": 0}, {"lr": math.nan}, {"lr": math.inf}],
    r"weight_decay must be in \[0, inf\)": [{"weight_decay": -0.1}],
    r"betas must be two numbers in \[0, 1\)": [{"betas": (0.9, 1.0)}, {"betas": (0.9,)}],
    r"eps must be in \(0, inf\)": [{"eps": 0.0}, {"eps": math.inf}],
    r"clip must be in \(0, inf\]": [{"clip": 0}, {"clip": math.nan}],
    r"label_smoothing must be in \[0, 1\)": [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}],
    r"warmup_ratio must be in \[0, 1\]": [{"warmup_ratio": 1.1}, {"warmup_ratio": math.nan}],
    "warmup_ratio or warmup_steps, and not both": [{"warmup_steps": 1, "warmup_ratio": 0.1}],
    "schedule must be one of linear, cosine, constant": [{"schedule": "step"}],
    "cuda_graph=True takes accumulate=1 and no checkpointing": [
        {"cuda_graph": True, "accumulate": 2},
        {"cuda_graph": True, "checkpointing": True},
    ],
}


@pytest.mark.parametrize("said", BAD_OPTIONS)
def test_a_bad_config_is_refused(said):
    for options in BAD_OPTIONS[said]:
        usual = {} if said.startswith("give epochs") or "epochs" in options else {"steps": 1}
        with pytest.raises(ValueError, match=f"^TrainConfig: .*{said}"):
            TrainConfig(**usual | options)


def test_a_bad_config_lists_all_its_faults():
    with pytest.raises(
        ValueError, match="^TrainConfig: batch_size .*; lr .*; clip .*; give epochs"
    ):
        TrainConfig(batch_size=0, lr=-1, clip=-1)


def test_a_run_can_be_repeated_on_a_copy():
    """The model carries no trace of a run: a copy trains on as the original does."""
    model = model_of(adapter=True)
    run(model)
    twin = copy.deepcopy(model)
    assert [r.loss for r in run(twin)] == [r.loss for r in run(model)]
    assert weights(twin) == weights(model)
