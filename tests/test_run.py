"""A run as a function of base, data, config and seed; its groups; and what it refuses to keep."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

import gpt2
import lora
from gpt2 import TrainConfig, batches, encode, train
from gpt2.data.order import seed_of
from gpt2.fast import devices
from gpt2.training.step import Stepper
from tests.runs import DATA, Letters, Logits, micro_batches, model_of, run, weights
from tests.toys import TINY, randomize


def table() -> nn.Module:
    return nn.Embedding(64, 64)


# A pure function


def test_a_micro_batch_sees_the_dropout_that_it_would_see_in_a_process_of_its_own():
    config = TrainConfig(lr=1e-2, steps=1, accumulate=2)
    (both,) = micro_batches(config)
    loss, norm, _ = Stepper(model_of(dropout=True).train(), config)(both, 1).tolist()
    share = 1 / sum(batch.n_tokens for batch in both)

    def alone(batch: gpt2.Batch, number: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model = model_of(dropout=True).train()
        torch.rand(number + 3)  # each process has a history of its own
        with devices.own_generators(torch.device("cpu")) as seed:
            seed(seed_of(42, 1, number))
            part = model(batch.idx, batch.labels) * share
            return part.detach(), list(torch.autograd.grad(part, list(model.parameters())))

    (one, first), (two, second) = alone(both[0], 0), alone(both[1], 1)
    assert float(one + two) == pytest.approx(loss, rel=1e-6)
    whole = torch.cat([(a + b).flatten() for a, b in zip(first, second, strict=True)])
    assert float(whole.norm()) == pytest.approx(norm, rel=1e-5)
    other, _ = alone(both[1], 0)
    assert float(other) != pytest.approx(float(two), rel=1e-3)  # the number matters, that is


def test_the_seeds_of_micro_batches_differ():
    seeds = {seed_of(s, t, m) for s in range(8) for t in range(20) for m in range(8)}
    assert len({seed % 2**32 for seed in seeds}) == 8 * 20 * 8  # all that a CPU's generator reads
    assert seed_of(42, 1, 0) == 6387305405971067920


def test_a_run_is_the_same_whatever_the_defaults_of_dtype_and_device():
    want = run(model_of(dropout=True, adapter=True))
    model = model_of(dropout=True, adapter=True)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        got = run(model)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert [r.loss for r in got] == [r.loss for r in want]


# Groups


def test_groups_are_the_textbooks():
    ours, theirs = model_of(adapter=True), model_of(adapter=True)
    config = TrainConfig(lr=1e-3, steps=6, schedule="constant", betas=(0.8, 0.95), eps=1e-6)
    for model in (ours, theirs):
        randomize(model)
    born = [p.detach().clone() for p in lora.trainable_parameters(ours)]
    list(train(ours, DATA, config, groups=lora.parameter_groups(ours, lr=1e-3)))
    optimizer = torch.optim.AdamW(
        lora.parameter_groups(theirs, lr=1e-3), betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0
    )
    theirs.train()
    for batch in islice(batches(DATA, 1, seed=config.seed, epoch=0), 6):
        gpt2.next_token_loss(theirs(batch.idx), batch.labels).backward()
        nn.utils.clip_grad_norm_(lora.trainable_parameters(theirs), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for p, q, at in zip(*map(lora.trainable_parameters, (ours, theirs)), born, strict=True):
        assert (p - q).norm() < 1e-3 * (q - at).norm()


def test_the_schedule_scales_each_groups_rate():
    model = model_of(adapter=True)
    config = TrainConfig(lr=5e-3, steps=4)
    groups = lora.parameter_groups(model, lr=1e-3, b_ratio=10)
    assert [r.lr for r in train(model, DATA, config, groups=groups)] == pytest.approx(
        [1e-3 * share for share in (1, 0.75, 0.5, 0.25)]
    )
    stepper = Stepper(model.train(), config, groups)
    stepper(micro_batches(config)[0], 1, 0.5)
    assert [g["lr"] for g in stepper.optimizer.param_groups] == pytest.approx([5e-4, 5e-3])
    assert stepper.peaks == [1e-3, 1e-2]


def test_parameters_of_a_group_may_be_given_by_a_generator():
    one, other = model_of(adapter=True), model_of(adapter=True)
    config = TrainConfig(lr=1e-3, steps=2)
    groups = [{"params": (p for p in lora.trainable_parameters(one))}]
    list(train(one, DATA, config, groups=groups))
    list(train(other, DATA, config))
    assert weights(one) == weights(other)


def groups_of(model: nn.Module) -> dict[str, list]:
    a, *rest = lora.trainable_parameters(model)
    return {
        r"in no group: transformer\.h\.0\S+B, .*, transformer\.h\.1\S+B": [{"params": [a]}],
        "more than one parameter group": [{"params": [a]}, {"params": [a, *rest]}],
        "1 parameters are not the model's": [
            {"params": [a, *rest]},
            {"params": [model.lm_head.weight]},
        ],
        r"group 0 has momentum \(known: lr, weight_decay,": [{"params": [a, *rest], "momentum": 1}],
        r"group 1: TrainConfig: lr must be in \(0, inf\), got -1": [
            {"params": a},
            {"params": rest, "lr": -1},
        ],
        "group 0: TrainConfig: eps must .* weight_decay must .* betas must be two numbers": [
            {"params": [a, *rest], "betas": (3, -2), "weight_decay": -5, "eps": -1},
        ],
    }


@pytest.mark.parametrize("said", groups_of(model_of(adapter=True)))
def test_groups_that_do_not_fit_are_refused(said):
    model = model_of(adapter=True)
    with pytest.raises(ValueError, match=said):
        train(model, DATA, TrainConfig(steps=1), groups=groups_of(model)[said])


def test_two_runs_in_two_threads_draw_as_alone():
    models = [model_of(dropout=True, adapter=True) for _ in range(4)]
    losses: dict[int, list[float]] = {}

    def work(i: int) -> None:
        losses[i] = [r.loss for r in run(models[i], seed=i % 2, steps=20)]

    with pytest.raises(KeyError), devices.own_generators(torch.device("cpu")):
        raise KeyError  # an error there leaves the turn to others
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, (2, 3)))
    for i in (0, 1):
        work(i)
        assert losses[i + 2] == losses[i]


def test_an_epochs_plan_is_made_once(monkeypatch):
    made: list[int] = []
    real = gpt2.data.batches.Buckets
    monkeypatch.setattr(gpt2.data.batches, "Buckets", lambda *a: (made.append(1), real(*a))[1])
    run(model_of(), tokens_per_batch=16, steps=9)
    assert len(made) == 1


@pytest.mark.parametrize("graphed", [False, True])
def test_a_step_is_padded_where_a_shape_costs_a_capture_alone(graphed, monkeypatch):
    """As on a GPU, where each step that is small is a CUDA graph."""
    shapes: set[tuple[int, ...]] = set()
    model = model_of()
    model.transformer.h[0].register_forward_pre_hook(lambda _, inputs: shapes.add(inputs[0].shape))
    monkeypatch.setattr(Stepper, "is_graphed", lambda self, tokens: graphed and tokens <= 4096)
    run(model, batch_size=2, steps=8)
    assert (shapes == {(2, 32, TINY.n_embd)}) == graphed


# Nothing in silence


def test_a_run_that_nobody_iterates_warns():
    steps = train(model_of(), DATA, TrainConfig(steps=1))
    with pytest.warns(RuntimeWarning, match="never iterated, so nothing was trained: write `for"):
        del steps


def test_a_run_that_is_iterated_or_closed_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model_of(), DATA, TrainConfig(steps=1)).close()
        next(train(model_of(), DATA, TrainConfig(steps=2)))
        assert len(list(train(model_of(), DATA, TrainConfig(steps=2)))) == 2
        gc.collect()


ONE = TrainConfig(steps=1)
GPU, LONG = TrainConfig(steps=1, cuda_graph=True), encode(["ab", "a" * 32], Letters())
PACKED = TrainConfig(steps=1, tokens_per_batch=64, packing=True)
COMPILED, FRUGAL = TrainConfig(steps=1, compile=True), TrainConfig(steps=1, checkpointing=True)
REFUSED = {
    r"data must be a gpt2.Dataset, got .*gpt2\.encode\(": [
        (model_of, data, ONE)
        for data in (["a", "b"], "data.jsonl", Path("data.jsonl"), [gpt2.Example("", "a")])
    ],
    "Nothing in the model requires grad": [(lambda: model_of().requires_grad_(False), DATA, ONE)],
    r"has 33 tokens .* takes 32: .* max_length=32": [(model_of, LONG, ONE)],
    r"compile=True needs a GPT2; give torch.compile\(model\) instead": [(table, DATA, COMPILED)],
    "checkpointing=True needs a GPT2": [(table, DATA, FRUGAL)],
    "packing takes a GPT-2, and the model is a Embedding": [(table, DATA, PACKED)],
    "cuda_graph=True needs a CUDA device": [(model_of, DATA, GPU)],
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_trained_is_refused_at_once(said):
    for model, data, config in REFUSED[said]:
        with pytest.raises(ValueError, match=said):
            train(model(), data, config)


@pytest.mark.parametrize("ratio", [0.01, 0.5, 1.0])
def test_a_run_of_one_step_trains_whatever_the_warm_up(ratio):
    config = TrainConfig(lr=1e-2, steps=1, warmup_ratio=ratio)
    model = model_of()
    before = weights(model)
    (record,) = train(model, DATA, config)
    assert record.lr == 1e-2
    assert weights(model) != before


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_weights_that_an_update_made_infinite_are_not_called_good(steps):
    model = model_of()
    config = TrainConfig(lr=3e38, steps=steps, weight_decay=10.0, schedule="constant")
    with pytest.raises(
        RuntimeError, match="made values infinite or NaN in .*: load the weights"
    ) as e:
        list(train(model, DATA, config))
    assert "good" not in str(e.value)
    assert not all(p.isfinite().all() for p in model.parameters())


def test_second_derivatives_of_the_loss_are_loud_and_torch_func_is_right():
    model = model_of()
    head = model.lm_head.requires_grad_(False)
    x = torch.randn(1, 6, TINY.n_embd, requires_grad=True)
    labels = torch.arange(6)[None]
    loss = gpt2.fast.head.summed_loss(head, x, labels, compiling=False)
    with pytest.raises(RuntimeError, match="differentiated once, .* or torch.func"):
        torch.autograd.grad(loss, x, create_graph=True)
    loss = gpt2.fast.head.summed_loss(head, x, labels, compiling=False)
    (once,) = torch.autograd.grad(loss, x)

    def of(x: torch.Tensor) -> torch.Tensor:
        return gpt2.fast.head.summed_loss(head, x, labels, compiling=False)

    torch.testing.assert_close(torch.func.grad(of)(x), once, rtol=1e-5, atol=1e-6)
    found = torch.func.hessian(of)(x.detach()).reshape(x.numel(), x.numel())
    assert found.abs().max() > 0.01
    torch.testing.assert_close(found, found.t())


def test_torch_func_differentiates_the_whole_model():
    model = model_of(adapter=False)
    model.requires_grad_(False)
    model.transformer.h[1].mlp.c_fc.weight.requires_grad_(True)
    idx = torch.arange(9)[None]
    (want,) = torch.autograd.grad(model(idx, idx), model.transformer.h[1].mlp.c_fc.weight)
    name = "transformer.h.1.mlp.c_fc.weight"
    parameters = {name: model.get_parameter(name).detach()}
    got = torch.func.grad(lambda p: torch.func.functional_call(model, p, (idx, idx)))(parameters)
    torch.testing.assert_close(got[name], want, rtol=1e-4, atol=1e-5)


# The paper's recipe


@pytest.mark.parametrize("wrapped", [False, True], ids=["GPT-2", "logits"])
def test_label_smoothing_is_in_the_steps_and_not_in_an_evaluation(wrapped):
    def made() -> nn.Module:
        return Logits(model_of(adapter=True)) if wrapped else model_of(adapter=True)

    plain, smooth = (run(made(), steps=1, label_smoothing=s)[0].loss for s in (0.0, 0.3))
    (batch,) = micro_batches(TrainConfig(steps=1))[0]
    logits = model_of(adapter=True)(batch.idx)[0, :-1]
    want = torch.nn.functional.cross_entropy(logits, batch.labels[0, 1:], label_smoothing=0.3)
    assert smooth == pytest.approx(float(want), rel=1e-5)
    assert smooth != pytest.approx(plain, rel=1e-3)
    model = made()
    before = gpt2.evaluate(model, DATA)
    run(model, steps=2, lr=1e-12, label_smoothing=0.3)
    assert gpt2.evaluate(model, DATA).loss == pytest.approx(before.loss, rel=1e-6)


def test_seconds_leave_out_what_the_caller_does():
    records: list[gpt2.StepRecord] = []
    for record in train(model_of(), DATA, TrainConfig(steps=4)):
        records.append(record)
        time.sleep(0.2)
    assert records[-1].seconds - records[0].seconds < 0.3


def test_training_does_not_import_the_compiler() -> None:
    """Its import takes up to five seconds, as long as torch's own."""
    code = (
        "import sys, torch, gpt2\n"
        "sizes = gpt2.GPT2Config(n_layer=1, n_head=1, n_embd=8, block_size=32)\n"
        "data = gpt2.encode(['a text', 'another'], gpt2.Tokenizer())\n"
        "list(gpt2.train(gpt2.GPT2(sizes), data, gpt2.TrainConfig(steps=3)))\n"
        "print('torch._dynamo' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
