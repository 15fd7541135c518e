"""A bank of adapters: which are there, which are in force, and what merging reports of them."""

from __future__ import annotations

import pytest
import torch

import lora
from tests.toys import IDX, deltas, randomize, raw, snapshot, tiny_gpt2


def bank(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """Two adapters of other ranks, scalings and targets; they meet in `c_attn`."""
    model = tiny_gpt2(dtype=dtype)
    lora.inject(model, r=2, alpha=3, targets="c_attn", adapter="legal", seed=0)
    lora.inject(model, r=4, alpha=5, rslora=True, targets=("c_attn", "c_fc"), adapter="poet")
    randomize(model, "legal", seed=1)
    randomize(model, "poet", seed=2)
    return model


def dense(deltas: list[tuple[float, dict[str, torch.Tensor]]], dtype=torch.float64):
    """The logits of a plain model to whose weights these deltas are added."""
    model = tiny_gpt2(dtype=dtype)
    with torch.no_grad():
        for weight, changes in deltas:
            for path, delta in changes.items():
                model.get_submodule(path).weight += (weight * delta).t()
    return model(IDX)


def test_the_bank_says_what_is_there_and_in_force():
    model = bank()
    have = lora.adapters(model)
    assert list(have) == ["legal", "poet"]
    assert {p: c.r for p, c in have["legal"].items()} == {
        f"transformer.h.{i}.attn.c_attn": 2 for i in (0, 1)
    }
    assert len(have["poet"]) == 4
    assert lora.active(model) == {"poet": 1.0}
    lora.activate(model, {"legal": 0.7, "poet": 0.3})
    assert lora.active(model) == {"legal": 0.7, "poet": 0.3}
    lora.activate(model, {})
    assert lora.active(model) == {}
    assert lora.trainable_parameters(model) == []


@pytest.mark.parametrize("mixture", [{"legal": 0.7, "poet": 0.3}, {"legal": -2}, {"poet": 0.0}, {}])
def test_a_mixture_is_the_weighted_sum_merged_or_not(mixture):
    model = bank()
    parts = [(w, deltas(lora.algebra.factors(model, n))) for n, w in mixture.items()]
    lora.activate(model, mixture)
    want = dense(parts)
    torch.testing.assert_close(model(IDX), want, rtol=1e-11, atol=1e-11)
    layer = model.transformer.h[0].attn.c_attn
    weight = layer.weight
    with lora.merged(model):
        torch.testing.assert_close(model(IDX), want, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(weight, layer.weight, rtol=1e-11, atol=1e-11)


def test_switching_walks_no_adapter(monkeypatch):
    """The cost of a switch is that of the layers, however many adapters they carry."""

    def calls(n: int) -> int:
        model = tiny_gpt2()
        for i in range(n):
            lora.inject(model, r=1, targets="c_attn", adapter=f"task{i}")
        count = 0
        original = torch.nn.Module.requires_grad_

        def counted(self, flag=True):
            nonlocal count
            count += 1
            return original(self, flag)

        with monkeypatch.context() as m:
            m.setattr(torch.nn.Module, "requires_grad_", counted)
            lora.activate(model, "task0")
        return count

    assert calls(2) == calls(12)


def test_remove_keeps_the_others_and_gives_bases_back():
    model = bank()
    lora.activate(model, {"legal": 1.0, "poet": 1.0})
    alone = bank()
    lora.activate(alone, "legal")
    assert len(lora.remove(model, "poet")) == 4
    assert lora.active(model) == {"legal": 1.0}
    assert torch.equal(model(IDX), alone(IDX))
    assert not isinstance(model.transformer.h[0].mlp.c_fc, lora.LoRALinear)
    lora.remove(model, "legal")
    assert torch.equal(model(IDX), tiny_gpt2(dtype=torch.float64)(IDX))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("state", ["merged", "routed", "disabled"])
def test_what_would_go_stale_is_refused(state, tmp_path):
    model = bank()
    lora.save(model, tmp_path, adapter="legal")
    value = lora.algebra.factors(model, "legal")
    context = {
        "merged": lora.merged(model),
        "routed": lora.routed(model, ["legal", None]),
        "disabled": lora.disabled(model),
    }[state]
    adding = [
        lambda: lora.inject(model, r=1, adapter="new"),
        lambda: lora.load(model, tmp_path, adapter="new"),
        lambda: lora.algebra.implant(model, value, "new"),
    ]
    changing = [
        lambda: lora.activate(model, "legal"),
        lambda: lora.activated(model, "legal").__enter__(),
        lambda: lora.remove(model, "poet"),
        lambda: lora.eject(model),
    ]
    with context:
        before = snapshot(model)
        for call in adding if state == "disabled" else [*adding, *changing]:
            with pytest.raises(RuntimeError, match=f"is {state}"):
                call()
            assert snapshot(model) == before


def test_activated_left_while_merged_folds_what_is_restored():
    model = bank()
    want = model(IDX)
    with lora.activated(model, "legal"):
        lora.merge(model)
    assert lora.is_merged(model)
    torch.testing.assert_close(model(IDX), want, rtol=1e-11, atol=1e-11)
    lora.unmerge(model)
    assert torch.equal(model(IDX), want)


def test_contexts_survive_a_body_that_adds_or_takes_away():
    model = bank()
    with lora.activated(model, "legal"):
        lora.inject(model, r=1, targets="mlp.c_proj", adapter="new")
        randomize(model, "new")
    assert lora.active(model) == {"poet": 1.0}
    assert torch.equal(model(IDX), bank()(IDX))  # a layer new in the body is not left in force
    for context in (lambda m: lora.activated(m, "legal"), lora.merged, lora.disabled):
        other = bank()
        with context(other):
            lora.eject(other, merge=lora.is_merged(other))
        assert not any(isinstance(m, lora.LoRALinear) for m in other.modules())


@pytest.mark.parametrize(
    "mixture",
    ["nobody", "", ["legal"], {"legal": float("nan")}, {"legal": float("inf")}],
)
def test_mixtures_that_are_refused(mixture):
    model = bank()
    before = snapshot(model)
    with pytest.raises(ValueError, match="legal|Give a name"):
        lora.activate(model, mixture)
    with pytest.raises(ValueError, match="legal|Give a name"):
        lora.routed(model, [mixture or {"nobody": 1}, "legal"]).__enter__()
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["0", "a b", "é✓", "a/b", "A", "base", "default_"])
def test_odd_names_work(name, tmp_path):
    model = tiny_gpt2()
    lora.inject(model, r=2, adapter=name)
    randomize(model, name)
    want = model(IDX)
    lora.save(model, tmp_path, adapter=name)
    lora.remove(model, name)
    lora.load(model, tmp_path, adapter=name)
    assert torch.equal(model(IDX), want)
    with lora.routed(model, [name, None]):
        torch.testing.assert_close(model(IDX)[0], want[0])


# What merge reports


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_report_is_the_rounding_error_of_each_layer(dtype):
    model = bank(dtype)
    lora.activate(model, {"legal": 0.5, "poet": 2.0})
    values = {
        name: {p: pair.delta() for p, pair in lora.algebra.factors(model, name).items()}
        for name in ("legal", "poet")
    }
    errors = lora.merge(model)
    assert set(errors) == set(values["poet"])
    for path, cost in errors.items():
        layer = model.get_submodule(path)
        ideal = layer.base.weight.detach().double().t() + 2 * values["poet"][path]
        if path in values["legal"]:
            ideal = ideal + 0.5 * values["legal"][path]
        error = (layer.weight.double().t() - ideal).abs()
        assert cost == pytest.approx(error.max().item(), rel=1e-6, abs=1e-15)
        eps = torch.finfo(dtype).eps
        assert cost <= 0.51 * eps * ideal.abs().max()  # no room for a second rounding


def test_the_order_in_which_a_mixture_is_written_changes_no_bit():
    model = tiny_gpt2()
    for seed, (name, targets) in enumerate({"b": "c_attn", "a": ("c_attn", "c_fc")}.items()):
        lora.inject(model, adapter=name, r=3, targets=targets)
        randomize(model, name, seed)
    idx = torch.arange(9)[None]
    outputs = []
    for mixture in ({"a": 0.3, "b": 0.7}, {"b": 0.7, "a": 0.3}):
        lora.activate(model, mixture)
        with lora.activated(model, "b"):
            pass
        outputs.append(raw(model(idx)))
        assert all(list(m.active) == sorted(m.active) for m in model.modules() if layered(m))
    assert outputs[0] == outputs[1]


def layered(module: torch.nn.Module) -> bool:
    return isinstance(module, lora.LoRALinear)
