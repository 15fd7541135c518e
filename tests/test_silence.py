"""Nothing wrong in silence: threads, late backward passes, shared and overlapping state."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gpt2
import lora
from tests.toys import IDX, randomize, raw, snapshot, tiny_gpt2


def two_adapters(**settings) -> nn.Module:
    model = tiny_gpt2()
    for name, seed in (("a", 1), ("b", 2)):
        lora.inject(model, adapter=name, r=2, **settings)
        randomize(model, name, seed)
    lora.activate(model, "a")
    return model


def grads(model: nn.Module, adapter: str) -> list[Tensor | None]:
    named = [(n, p) for n, p in model.named_parameters() if f".{adapter}." in n]
    return [p.grad for _, p in named]


def flags(model: nn.Module) -> dict[str, bool]:
    return {n: p.requires_grad for n, p in model.named_parameters()}


def base_bytes(model: nn.Module) -> dict[str, bytes]:
    return {k: raw(v) for k, v in lora.base_state_dict(model).items()}


# Threads


def test_threads_that_run_one_merged_model_all_get_its_outputs_and_leave_its_base():
    model = two_adapters(targets="all-linear")
    lora.merge(model)
    before = base_bytes(model)
    with torch.no_grad():
        want = model(IDX)
    right: list[bool] = []

    def work() -> None:
        with torch.no_grad():
            right.extend(torch.equal(model(IDX), want) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 80
    assert base_bytes(model) == before


# Routing


def test_an_adapter_that_no_row_names_cannot_spoil_rows():
    model = two_adapters()
    with torch.no_grad():
        base = two_adapters()
        with lora.disabled(base):
            want = base(IDX)
        for name, p in model.named_parameters():
            if ".a." in name:
                p.fill_(3e38)
        with lora.routed(model, [None, "b"]):
            y = model(IDX)
        assert torch.isfinite(y).all()
        torch.testing.assert_close(y[0], want[0])
        for name, p in model.named_parameters():
            if ".b." in name:
                p.fill_(3e38)
        with lora.routed(model, [None, "b"]):
            torch.testing.assert_close(model(IDX)[0], want[0])  # nor one that another row names


# Flags, copies and loading


@pytest.mark.parametrize("verb", ["inject", "activate", "activated", "routed", "remove"])
def test_factors_that_the_user_froze_stay_frozen(verb):
    model = tiny_gpt2()
    lora.inject(model, adapter="a", r=2)
    for name, p in model.named_parameters():
        if name.endswith(".A"):
            p.requires_grad_(False)
    lora.inject(model, adapter="b", r=2)
    if verb != "inject":
        lora.activate(model, "a")
    before = flags(model)
    if verb == "activate":
        lora.activate(model, "b")
        lora.activate(model, "a")
    elif verb == "activated":
        with lora.activated(model, "b"):
            assert flags(model) == before
    elif verb == "routed":
        with lora.routed(model, ["a", "b"]):
            assert flags(model) == before
    elif verb == "remove":
        lora.remove(model, "b")
        before = {n: on for n, on in before.items() if ".b." not in n}
    assert flags(model) == before
    assert not any(on for n, on in before.items() if n.endswith(".a.A"))


def test_load_state_dict_while_merged_is_refused():
    """What is folded would go stale."""
    model = two_adapters()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    lora.merge(model)
    with pytest.raises(RuntimeError, match=r"is merged. Call lora.unmerge before load_state_dict"):
        model.load_state_dict(state)
    lora.unmerge(model)
    model.load_state_dict(state)


@pytest.mark.parametrize("replaced", ["assign", "to_empty", "to meta and back"])
def test_eject_thaws_the_parameters_that_stand_there_now(replaced):
    model = tiny_gpt2()
    model.transformer.wpe.weight.requires_grad_(False)
    before = flags(model)
    lora.inject(model, r=2)
    if replaced == "assign":
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    elif replaced == "to_empty":
        model.to_empty(device="cpu")
    else:
        model.to("meta").to_empty(device="cpu")
    lora.eject(model)
    after = flags(model)  # torch unties the head where it assigns
    assert {name: after[name] for name in before} == before
    assert all(after[name] for name in after.keys() - before.keys())


def test_an_eject_that_fails_at_a_layer_has_changed_none():
    model = two_adapters(targets="all-linear")
    with torch.no_grad():
        last = [p for n, p in model.named_parameters() if n.endswith("mlp.c_proj.updates.a.B")][-1]
        last.fill_(torch.inf)
    before = snapshot(model)
    with pytest.raises(ValueError, match="NaN or infinite"):
        lora.eject(model, merge=True)
    assert snapshot(model) == before


def test_weights_that_lie_beside_one_another_are_not_shared():
    pool = torch.randn(12, 4)
    first, second = nn.Linear(4, 6), nn.Linear(4, 6)
    first.weight, second.weight = nn.Parameter(pool[:6]), nn.Parameter(pool[6:])
    assert lora.inject(nn.Sequential(first, second), targets=("0", "1"), r=2) == ["0", "1"]


def test_dare_does_not_depend_on_the_order_of_layers():
    model = two_adapters(targets="all-linear")
    values = [lora.algebra.factors(model, name) for name in "ab"]
    turned = [dict(reversed(value.items())) for value in values]
    here, there = (lora.algebra.dare(v, 0.5, seed=3) for v in (values, turned))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[path], there[path]) for path in here)
    alone = lora.algebra.dare([{p: v[p] for p in list(v)[-1:]} for v in values], 0.5, seed=3)
    assert all(torch.equal(here[path], delta) for path, delta in alone.items())
    other = lora.algebra.dare(values, 0.5, seed=4)
    assert not any(torch.equal(here[path], other[path]) for path in here)


@pytest.mark.parametrize("foreign", [-1, 50_000])
def test_data_of_another_vocabulary_is_refused_before_a_step(foreign):
    ids = np.array([1, 2, 3, 4, 5, 6, 7, foreign])
    data, model = gpt2.Dataset(ids, np.array([4, 8]), 0), tiny_gpt2()
    lora.inject(model, r=2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for call in (
        lambda: list(gpt2.train(model, data, gpt2.TrainConfig(steps=2, lr=1e-3))),
        lambda: gpt2.evaluate(model, data),
    ):
        with pytest.raises(ValueError, match=rf"ids from .*{foreign}.* model 0 to \d+: encode"):
            call()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
