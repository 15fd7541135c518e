"""A population: each adapter ends as if it had been alone, whatever its neighbours do."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gpt2
import lora
from gpt2.data.order import Order
from gpt2.population.training import PopulationTraining
from tests.devices import pretended_device
from tests.toys import TINY, tiny_gpt2
from tests.toys import tiny_data as data

STEPS = 200 if "LONG" in os.environ else 30
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def base(
    dtype: torch.dtype = torch.float64, dropout: float = 0.1, device: str = "cpu"
) -> gpt2.GPT2:
    return tiny_gpt2(0, dtype, dropout, device)


ROOM = lora.LoRAConfig(r=4, targets=("c_attn", "mlp.c_fc", "c_proj"), dropout=0.1)
ADAPTERS = [
    lora.LoRAConfig(r=2, alpha=4, dropout=0.2, targets=("c_attn",), seed=3),
    lora.LoRAConfig(r=4, alpha=16, targets=("attn.c_proj", "c_fc"), seed=4),
    lora.LoRAConfig(r=1, alpha=1, dropout=0.1, targets=("c_attn", "c_fc", "c_proj"), seed=5),
    lora.LoRAConfig(r=3, alpha=8, dropout=0.3, rslora=True, layers=[1], seed=6),
]
CONFIGS = [
    gpt2.TrainConfig(steps=STEPS, batch_size=2, lr=1e-2, seed=1, weight_decay=0.1),
    gpt2.TrainConfig(steps=STEPS, batch_size=2, lr=3e-3, seed=2, schedule="cosine", clip=0.05),
    gpt2.TrainConfig(
        epochs=8, batch_size=2, lr=2e-2, seed=3, accumulate=3, warmup_ratio=0.2, clip=None
    ),
    gpt2.TrainConfig(steps=STEPS, batch_size=2, lr=1e-3, seed=1, schedule="constant"),
]
RATIOS = [1.0, 4.0, 16.0, 1.0]
Outcome = tuple[list[float], dict[str, Tensor]]


def alone(
    i: int,
    model: gpt2.GPT2,
    adapter: lora.LoRAConfig | None = None,
    examples: gpt2.Dataset | None = None,
    **how: object,
) -> Outcome:
    """Losses, and factors by the path of their layer and `.A` or `.B`."""
    config = replace(CONFIGS[i], **how)
    lora.inject(model, adapter or ADAPTERS[i])
    groups = lora.parameter_groups(model, config.lr, b_ratio=RATIOS[i])
    losses = [
        record.loss for record in gpt2.train(model, examples or data(), config, groups=groups)
    ]
    named = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return losses, {name.replace(".updates.default", ""): p for name, p in named.items()}


def outcome(training: PopulationTraining, slots: lora.Population, i: int) -> Outcome:
    own = training.trainings[i]
    assert own is not None
    updates = slots.take(i)
    factors = {f"{p}.{n}": f.detach() for p, u in updates.items() for n, f in u.named_parameters()}
    return [*own.losses], factors


def population(
    model: gpt2.GPT2,
    which: tuple[int | None, ...] = (0, 1, 2, 3),
    adapters: list[lora.LoRAConfig] = ADAPTERS,
    examples: gpt2.Dataset | None = None,
    **how: object,
) -> tuple[PopulationTraining, lora.Population]:
    """Slot i trains case `which[i]`; None is an empty slot."""
    slots = lora.Population(model, len(which), ROOM)
    training = PopulationTraining(model, slots, examples or data(), replace(CONFIGS[0], **how))
    for slot, case in enumerate(which):
        if case is not None:
            slots.draw(slot, adapters[case])
            training.start(slot, replace(CONFIGS[case], **how), ratios={"B": RATIOS[case]})
    return training, slots


def to_the_end(training: PopulationTraining) -> None:
    while training.advance(7):
        pass


def same(one: Outcome, other: Outcome) -> None:
    """To the bit."""
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name, factor in one[1].items():
        assert torch.equal(factor, other[1][name]), name


def near(one: Outcome, other: Outcome, **how: float) -> None:
    assert one[1].keys() == other[1].keys()
    torch.testing.assert_close(torch.tensor(one[0]), torch.tensor(other[0]), rtol=1e-5, atol=1e-6)
    for name, factor in one[1].items():
        torch.testing.assert_close(factor, other[1][name], msg=name, **how)


@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        (torch.float64, {"rtol": 1e-12, "atol": 1e-12}),
        (torch.float32, {"rtol": 1e-3, "atol": 1e-4}),
    ],
    ids=str,
)
def test_each_ends_as_if_it_had_been_alone(dtype, how):
    """Ranks, alphas, dropouts, targets, schedules, seeds, clips and accumulation all differ."""
    training, slots = population(base(dtype))
    to_the_end(training)
    for i in range(4):
        near(outcome(training, slots, i), alone(i, base(dtype)), **how)


@gpu
@pytest.mark.parametrize("compile", [False, True])
def test_each_ends_as_if_it_had_been_alone_on_a_gpu(compile):
    adapters = [replace(adapter, dropout=0.0) for adapter in ADAPTERS]
    training, slots = population(
        base(torch.float32, 0.0, "cuda"), adapters=adapters, compile=compile
    )
    to_the_end(training)
    assert training.graphs is not None
    assert len(training.graphs.captured) == 1
    for i in range(4):
        model = base(torch.float32, 0.0, "cuda")
        want = alone(i, model, adapters[i], cuda_graph=False)
        near(outcome(training, slots, i), want, rtol=1e-2, atol=1e-3)


@gpu
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu_no_neighbour_moves_a_bit_with_dropout_on(compile):
    outcomes: list[Outcome] = []
    for which in ((0, 1, 2, 3), (0, None, 3, 1), (0, 1, 2, 3)):
        training, slots = population(base(torch.float32, 0.1, "cuda"), which, compile=compile)
        to_the_end(training)
        outcomes.append(outcome(training, slots, 0))
        slots.eject()
    same(outcomes[0], outcomes[2])
    same(outcomes[0], outcomes[1])


@gpu
def test_on_a_gpu_a_long_example_moves_no_bit_of_a_neighbour():
    """A pass of all slots and a pass of one are captured, each with an update and without."""
    lengths = np.where(np.arange(64) == 40, 100, 8)
    ids = np.arange(lengths.sum(), dtype=np.int32) % TINY.vocab_size
    examples = gpt2.Dataset(ids, np.cumsum(lengths), np.zeros(64, np.int32))
    outcomes: list[Outcome] = []
    for seeds in ((0, 1, 2, 3), (0, 7, 8, 9)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = gpt2.GPT2(replace(TINY, block_size=128)).cuda()
        slots = lora.Population(model, 4, r=2, targets="c_attn", dropout=0.1)
        training = PopulationTraining(model, slots, examples, gpt2.TrainConfig(epochs=1))
        for slot, seed in enumerate(seeds):
            slots.draw(slot, seed=seed)
            training.start(slot, gpt2.TrainConfig(epochs=1, seed=seed))
        to_the_end(training)
        assert training.width == 32
        assert 3 <= len(training.graphs.captured) <= 4
        outcomes.append(outcome(training, slots, 0))
    same(outcomes[0], outcomes[1])


@gpu
def test_a_gpu_captures_once_whatever_comes_and_goes():
    training, slots = population(base(torch.float32, 0.1, "cuda"))
    for n in range(1000):
        slots.draw(n % 4, replace(ADAPTERS[n % 3], seed=n))
        training.start(n % 4, replace(CONFIGS[n % 3], seed=n))
        training.advance(1)
    assert len(training.graphs.captured) == 1


def read_by(slot: int, n: int, **how: object) -> set[int]:
    """The numbers of the examples that a case reads."""
    config = replace(CONFIGS[slot], **how)
    size = config.batch_size * config.accumulate * config.steps
    return {*Order(n).at(np.arange(min(size, n)), seed=config.seed, epoch=0)[0].tolist()}


@pytest.mark.parametrize("fate", ["another", "none", "NaN", "retired"])
def test_no_neighbour_moves_a_bit(fate):
    """Whatever slot 1 is, or comes to, which alone reads an example of another length."""
    how = {"epochs": None, "steps": 12}
    long = read_by(1, 97, **how) - read_by(0, 97, **how) - read_by(2, 97, **how)
    how["examples"] = data(97, (min(long),))
    want, wanted = population(base(), **how)
    to_the_end(want)
    which = (0, {"another": 3, "none": None}.get(fate, 1), 2, 3)
    training, slots = population(base(), which, **how)
    assert training.width == 12
    if fate == "NaN":
        training.advance(5)
        with torch.no_grad():
            next(iter(slots.layers.values())).A[1, 0, 0] = torch.nan
            slots.layers["transformer.h.0.mlp.c_fc"].A[1, 0, 0] = torch.nan
    if fate == "retired":
        training.advance(5)
        training.trainings[1] = None
    to_the_end(training)
    for i in (0, 2, 3):
        same(outcome(training, slots, i), outcome(want, wanted, i))
    if fate == "NaN":
        own = training.trainings[1]
        assert own is not None
        assert own.ended is not None
        assert own.ended.startswith("Step 6: the loss is nan")
        assert len(own.losses) == 6


def test_slots_with_long_examples_end_as_alone_whoever_their_neighbours_are():
    examples = data(60, (7, 30, 45, 50))
    outcomes: list[Outcome] = []
    for numbers in (range(12), range(11, -1, -1), (5, 2, 7)):
        slots = lora.Population(model := base(), 12, ROOM)
        training = PopulationTraining(model, slots, examples, CONFIGS[0])
        for slot, n in enumerate(numbers):
            slots.draw(slot, replace(ADAPTERS[n % 4], seed=n))
            training.start(slot, replace(CONFIGS[0], steps=8, seed=n, accumulate=1 + n % 2))
        to_the_end(training)
        assert training.width == 12
        outcomes.append(outcome(training, slots, [*numbers].index(7)))
    adapter = replace(ADAPTERS[3], seed=7)
    how = {"steps": 8, "seed": 7, "accumulate": 2, "schedule": "linear"}
    near(outcomes[0], alone(0, base(), adapter, examples, **how), rtol=1e-12, atol=1e-12)
    same(outcomes[0], outcomes[1])
    same(outcomes[0], outcomes[2])


def test_one_long_example_makes_no_other_slot_wider():
    """With 63 examples of 8 tokens and one of 32 each pass is of one width."""
    lengths = np.full(64, 8)
    lengths[40] = 32
    ids = np.arange(lengths.sum(), dtype=np.int32) % TINY.vocab_size
    examples = gpt2.Dataset(ids, np.cumsum(lengths), np.zeros(64, np.int32))
    slots = lora.Population(model := base(), 8, r=2, targets="c_attn")
    training = PopulationTraining(model, slots, examples, gpt2.TrainConfig(epochs=1))
    for slot in range(8):
        slots.draw(slot, seed=slot)
        training.start(slot, gpt2.TrainConfig(epochs=1, seed=slot))
    seen: list[tuple[int, ...]] = []
    model.transformer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    assert training.advance(100) == 64
    assert seen.count((1, 32)) == 8
    assert len(seen) - seen.count((8, 8)) == 8
    assert len(seen) <= 64 + 8


def test_an_apple_gpu_trains_and_evaluates_as_a_cpu_does():
    """But for dropout, whose masks are the device's own."""
    figures = list[list[float]]()
    with pretended_device() as device:
        for where, dropout in (("cpu", 0.0), (device, 0.0), (device, 0.1)):
            adapters = [replace(adapter, dropout=dropout) for adapter in ADAPTERS]
            model = base(torch.float32, dropout, str(where))
            training, slots = population(model, (0, 1), adapters, steps=3, examples=data(9, (4,)))
            to_the_end(training)
            losses = outcome(training, slots, 0)[0] + outcome(training, slots, 1)[0]
            figures.append(losses + training.evaluate(data(5)))
    assert figures[1] == pytest.approx(figures[0], rel=1e-4)
    assert all(math.isfinite(figure) for figure in figures[2])
    assert figures[2] != pytest.approx(figures[1], rel=1e-2)


def test_a_training_leaves_its_slot_and_goes_on_in_another():
    want, wanted = population(base())
    to_the_end(want)
    training, slots = population(base())
    training.trainings[0].until = training.trainings[2].until = 4
    to_the_end(training)
    states = {i: training.state(i) for i in (0, 2)}
    slots.draw(0, ADAPTERS[3])
    training.start(0, CONFIGS[3])
    training.trainings[0].until = 3
    training.go_on(2, replace(states[0], until=None))
    to_the_end(training)
    training.go_on(0, replace(states[2], until=None))
    to_the_end(training)
    same(outcome(training, slots, 2), outcome(want, wanted, 0))
    same(outcome(training, slots, 0), outcome(want, wanted, 2))


def test_gradients_are_right_with_dropout_replayed():
    """Of a layer's input and factors, against finite differences under the very same masks."""
    model = nn.Sequential(nn.Linear(3, 4)).double()
    slots = lora.Population(model, 2, r=2, targets="0", dropout=0.3)
    slots.draw(0, r=2, targets="0", dropout=0.3, seed=0)
    slots.draw(1, r=1, targets="0", seed=1)
    layer = slots.layers["0"]
    mask = torch.rand(4, 5, 3, dtype=torch.float64).round() / 0.7
    layer.drops = lambda x, rates: torch.cat([x[:2] * mask[:2], x[2:]])  # slot 1 drops nothing
    a, b = (torch.randn_like(t, requires_grad=True) for t in (layer.A, layer.B))
    x = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"A": a, "B": b}, (x,))

    assert torch.autograd.gradcheck(run, (x, a, b))
    assert torch.autograd.gradgradcheck(run, (x, a, b))


def test_held_out_losses_are_those_of_each_adapter_alone_and_not_smoothed():
    training, slots = population(base(), label_smoothing=0.3)
    training.advance(20)
    found = training.evaluate(data(5), batch_size=2)
    for i in range(4):
        with slots.adapter(i) as model:
            assert found[i] == pytest.approx(gpt2.evaluate(model, data(5)).loss, rel=1e-12)


def test_an_adapter_goes_out_and_comes_in_as_an_ordinary_one(tmp_path):
    model = base()
    before = dict(model.named_modules())
    flags = [p.requires_grad for p in model.parameters()]
    training, slots = population(model)
    training.advance(20)
    idx = torch.randint(0, TINY.vocab_size, (4, 6))
    together = model(idx)
    with slots.adapter(2, "tuned") as alone_there:
        assert lora.active(alone_there) == {"tuned": 1.0}
        torch.testing.assert_close(alone_there(idx)[2], together[2])
        lora.save(alone_there, tmp_path / "adapter", adapter="tuned")
        with lora.merged(alone_there):
            torch.testing.assert_close(alone_there(idx)[2], together[2])
    assert torch.equal(model(idx), together)
    slots.put(0, slots.take(2))
    torch.testing.assert_close(model(idx[[2, 1, 2, 3]])[0], together[2])
    with pytest.raises(RuntimeError, match="runs under a population"):
        lora.inject(model)
    slots.eject()
    after = dict(model.named_modules())
    assert after.keys() == before.keys()
    assert all(after[name] is module for name, module in before.items())
    assert [p.requires_grad for p in model.parameters()] == flags


def test_an_empty_slot_is_the_base_and_a_new_adapter_has_no_old_gradient():
    model, idx = base(), torch.randint(0, TINY.vocab_size, (2, 6))
    want = model(idx)
    slots = lora.Population(model, 2, ROOM)
    torch.testing.assert_close(model(idx), want, rtol=0, atol=1e-14)
    slots.grad.fill_(1)
    slots.draw(0, ADAPTERS[0])
    assert slots.grad.any(1).tolist() == [False, True]
    slots.clear(0)
    assert not slots.flat.any()
    with pytest.raises(ValueError, match="Slot 0 is empty"):
        slots.take(0)


def test_what_has_no_room_is_refused_and_changes_nothing():
    model = base()
    slots = lora.Population(model, 2, r=2, targets="c_attn")
    for fault, settings in {
        "has rank 3, at most 2 fits": {"r": 3},
        "mlp.c_fc is no target of it": {"r": 1, "targets": "c_fc"},
        "has dropout, and the population has none": {"r": 1, "dropout": 0.1},
        "takes whole linear layers only": {"r": 1, "targets": "c_attn[q,v]"},
        "takes whole linear layers only, not Embedding": {"r": 1, "modules_to_save": "wpe"},
        "No module matches target 'q_proj'": {"targets": "q_proj"},
    }.items():
        with pytest.raises(ValueError, match=fault):
            slots.draw(0, **settings)
    with pytest.raises(ValueError, match=r"slot must be in 0..1, got 2"):
        slots.draw(2, r=1)
    assert not slots.flat.any()
    with pytest.raises(ValueError, match="5 rows, which are not 2 equal blocks"):
        model(torch.zeros(5, 3, dtype=torch.long))
    slots.eject()
    with pytest.raises(RuntimeError, match="is not on the model"):
        slots.eject()
    lora.inject(model)
    with pytest.raises(RuntimeError, match="carries adapters"):
        lora.Population(model, 2, r=2)


def test_what_cannot_be_trained_is_refused_and_changes_nothing():
    """A state of another batch size would stand in a neighbour's block."""
    training, slots = population(base(), (0, None))
    training.advance(3)
    dropping = nn.Sequential(nn.Embedding(61, 8), nn.Dropout(0.1), nn.Linear(8, 61))
    others = lora.Population(dropping, 2, r=2, targets="2")
    wanted = slots.flat.clone(), [copy.copy(own) for own in training.trainings]
    config, state, start = CONFIGS[0], training.state(0), training.start
    larger = replace(config, batch_size=3)
    for fault, call in {
        "batch_size is 3 here and 2 in all": lambda: start(0, larger),
        "batch_size is 3 here and 2": lambda: training.go_on(0, replace(state, config=larger)),
        "must match the size": lambda: training.go_on(0, replace(state, moments=torch.ones(2, 7))),
        "'C' has the ratio 2.0: give A and B": lambda: start(0, config, ratios={"C": 2.0}),
        "'B' has the ratio -1: give A and B": lambda: start(0, config, ratios={"B": -1}),
        "Slot 1 is empty": lambda: start(1, config),
        "slot must be in 0..1, got 5": lambda: start(5, config),
        "checkpointing is for one training alone": lambda: PopulationTraining(
            training.model, slots, data(), replace(config, checkpointing=True)
        ),
        "cuda_graph=True needs a CUDA device": lambda: PopulationTraining(
            training.model, slots, data(), replace(config, cuda_graph=True)
        ),
        "1 cannot drop by slots": lambda: PopulationTraining(dropping, others, data(), config),
    }.items():
        with pytest.raises((ValueError, RuntimeError), match=fault):
            call()
    assert torch.equal(slots.flat, wanted[0])
    assert training.trainings == wanted[1]
    to_the_end(training)
    same(outcome(training, slots, 0), outcome(*only(base()), 0))


def only(model: gpt2.GPT2) -> tuple[PopulationTraining, lora.Population]:
    training, slots = population(model, (0, None))
    to_the_end(training)
    return training, slots


def test_a_model_that_does_not_run_under_the_slots_is_not_judged_in_their_place():
    """Taken off, lent out, or another model: the base's own loss is no slot's."""
    training, slots = population(base())
    with pytest.raises(RuntimeError, match="does not run under these slots"):
        PopulationTraining(base(), slots, data(), CONFIGS[0])
    with slots.adapter(0), pytest.raises(RuntimeError, match="lend the model out"):
        training.evaluate(data(5))
    slots.eject()
    for call in (lambda: training.evaluate(data(5)), lambda: training.advance(1)):
        with pytest.raises(RuntimeError, match="were taken off"):
            call()
    with pytest.raises(RuntimeError, match="is not on the model"), slots.adapter(0):
        pass
    lora.inject(training.model, targets="c_attn")  # it is a plain model still


def test_a_slot_is_refilled_after_an_interrupt(monkeypatch):
    training, slots = population(base())
    real, calls = training._tick, [0]

    def tick() -> object:
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt
        return real()

    monkeypatch.setattr(training, "_tick", tick)
    with pytest.raises(KeyboardInterrupt):
        training.advance(9)
    slots.draw(0, ADAPTERS[0])
    training.start(0, CONFIGS[0])
    to_the_end(training)
    same(outcome(training, slots, 0), outcome(*only(base()), 0))


def test_a_slot_that_failed_rests_until_a_training_goes_on_in_it():
    """Neither the step that was not finite is applied nor those after it."""
    want, wanted = population(base(), (0, 1))
    to_the_end(want)
    training, slots = population(base(), (0, 1))
    training.advance(3)
    state, flat = training.state(1), slots.flat.clone()
    slots.grad[1] = torch.inf
    training.advance(5)
    assert torch.equal(slots.flat[1], flat[1])
    failed = training.trainings[1]
    assert failed.ended.startswith("Step 4: the loss is 4.")
    assert (failed.taken, len(failed.losses), len(state.losses)) == (3, 4, 3)
    training.go_on(1, state)
    to_the_end(training)
    for i in (0, 1):
        same(outcome(training, slots, i), outcome(want, wanted, i))


def test_a_slot_takes_its_defaults_from_the_population_but_no_seed():
    model = base()
    slots = lora.Population(model, 3, r=4, alpha=2, targets=("c_attn", "c_fc"), seed=5)
    for i in range(3):
        slots.draw(i)
    assert not torch.equal(slots.flat[0], slots.flat[1])
    slots.draw(0, seed=1)
    slots.draw(1, alpha=8, seed=1)
    first, second = slots.take(0), slots.take(1)
    assert {u.config.r for u in first.values()} == {4}
    assert {path.rpartition(".")[2] for path in first} == {"c_attn", "c_fc"}
    assert {
        (u.config.alpha, v.config.alpha)
        for u, v in zip(first.values(), second.values(), strict=True)
    } == {(2, 8)}
    assert torch.equal(slots.flat[0], slots.flat[1])
    slots.draw(2, lora.LoRAConfig(r=1))
    assert {u.config.r for u in slots.take(2).values()} == {1}
    assert {path.rpartition(".")[2] for path in slots.take(2)} == {"c_attn"}


def test_a_body_that_merges_leaves_the_population_and_its_own_error():
    model = base()
    slots = lora.Population(model, 2, r=2)
    slots.draw(0)
    flat = slots.flat.clone()
    with slots.adapter(0) as lifted:
        lora.merge(lifted)
    with pytest.raises(KeyError), slots.adapter(0) as lifted:
        lora.merge(lifted)
        raise KeyError
    assert torch.equal(slots.flat, flat)
    slots.draw(1)
    slots.eject()
    assert not any(isinstance(m, lora.LoRALinear) for m in model.modules())


def test_a_model_that_is_cast_or_moved_leaves_no_layer_without_its_population():
    model = base(dtype=torch.float32)
    slots = lora.Population(model, 2, r=2)
    slots.draw(0)
    model.bfloat16()
    assert model.transformer.h[0].attn.c_attn.base.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in slots.parameters)
    slots.flat.fill_(7)
    assert all((p == 7).all() for p in slots.parameters)
    with pytest.raises(RuntimeError, match="Eject the population before you move"):
        model.to("meta")
