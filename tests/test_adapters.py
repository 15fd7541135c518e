"""A bank of adapters: which are there, which are in force; contexts, and training under them."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lora
from tests.toys import IDX, MLP, adapted, deltas, randomize, raw, refused, snapshot, tiny_gpt2

EXACT = {"rtol": 1e-11, "atol": 1e-11}


def bank(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Two adapters of other ranks, scalings and targets; they meet in `c_attn`."""
    model = adapted(tiny_gpt2(dtype=dtype), alpha=3, targets="c_attn", adapter="legal")
    poet = {"r": 4, "alpha": 5, "rslora": True, "targets": ("c_attn", "c_fc"), "values": 2}
    return adapted(model, adapter="poet", **poet)


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
    assert lora.remove(model, "legal") == list(have["legal"])


@pytest.mark.parametrize("mixture", [{"legal": 0.7, "poet": 0.3}, {"legal": -2}, {"poet": 0.0}, {}])
def test_a_mixture_is_the_weighted_sum_merged_or_not(mixture):
    model, plain = bank(), tiny_gpt2(dtype=torch.float64)
    with torch.no_grad():
        for name, weight in mixture.items():
            for path, delta in deltas(lora.algebra.factors(model, name)).items():
                plain.get_submodule(path).weight += (weight * delta).t()
    lora.activate(model, mixture)
    torch.testing.assert_close(model(IDX), plain(IDX), **EXACT)
    layer = model.transformer.h[0].attn.c_attn
    weight = layer.weight
    with lora.merged(model):
        torch.testing.assert_close(model(IDX), plain(IDX), **EXACT)
        torch.testing.assert_close(weight, layer.weight, **EXACT)


def test_the_order_in_which_a_mixture_is_written_changes_no_bit():
    model = tiny_gpt2()
    for seed, (name, targets) in enumerate({"b": "c_attn", "a": ("c_attn", "c_fc")}.items()):
        adapted(model, adapter=name, r=3, targets=targets, values=seed)
    outputs = []
    for mixture in ({"a": 0.3, "b": 0.7}, {"b": 0.7, "a": 0.3}):
        lora.activate(model, mixture)
        with lora.activated(model, "b"):
            pass
        outputs.append(raw(model(IDX)))
        layers = [m for m in model.modules() if isinstance(m, lora.LoRALinear)]
        assert all(list(layer.active) == sorted(layer.active) for layer in layers)
    assert outputs[0] == outputs[1]


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
        for call in adding if state == "disabled" else [*adding, *changing]:
            with refused(model, f"is {state}", RuntimeError):
                call()


def test_activated_left_while_merged_folds_what_is_restored():
    model = bank()
    want = model(IDX)
    with lora.activated(model, "legal"):
        lora.merge(model)
    assert lora.is_merged(model)
    torch.testing.assert_close(model(IDX), want, **EXACT)
    lora.unmerge(model)
    assert torch.equal(model(IDX), want)


def test_contexts_survive_a_body_that_adds_or_takes_away():
    model = bank()
    with lora.activated(model, "legal"):
        adapted(model, r=1, targets="mlp.c_proj", adapter="new")
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
    with refused(model, "legal|Give a name"):
        lora.activate(model, mixture)
    with refused(model, "legal|Give a name"):
        lora.routed(model, [mixture or {"nobody": 1}, "legal"]).__enter__()


@pytest.mark.parametrize("name", ["0", "a b", "é✓", "a/b", "A", "base", "default_"])
def test_odd_names_work(name, tmp_path):
    model = adapted(adapter=name)
    want = model(IDX)
    lora.save(model, tmp_path, adapter=name)
    lora.remove(model, name)
    lora.load(model, tmp_path, adapter=name)
    assert torch.equal(model(IDX), want)
    with lora.routed(model, [name, None]):
        torch.testing.assert_close(model(IDX)[0], want[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_report_is_the_rounding_error_of_each_layer(dtype):
    model = bank(dtype)
    lora.activate(model, {"legal": 0.5, "poet": 2.0})
    legal, poet = (deltas(lora.algebra.factors(model, name)) for name in ("legal", "poet"))
    errors = lora.merge(model)
    assert set(errors) == set(poet)
    for path, cost in errors.items():
        layer = model.get_submodule(path)
        ideal = layer.base.weight.detach().double().t() + 2 * poet[path]
        if path in legal:
            ideal = ideal + 0.5 * legal[path]
        error = (layer.weight.double().t() - ideal).abs()
        assert cost == pytest.approx(error.max().item(), rel=1e-6, abs=1e-15)
        eps = torch.finfo(dtype).eps
        assert cost <= 0.51 * eps * ideal.abs().max()  # no room for a second rounding


# Training: what a late backward pass gives, checkpointed or not

X = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
BOTH = {"a": 1.0, "b": 1.0}
CONTEXTS = {
    "disabled": lora.disabled,
    "merged": lora.merged,
    "activated": lambda model: lora.activated(model, "b"),
    "routed": lambda model: lora.routed(model, ["b", None]),
}


def two_adapters(trained: object = "a") -> nn.Module:
    torch.manual_seed(0)
    model = MLP()
    for name in "ab":
        lora.inject(model, adapter=name, targets="all-linear", r=2)
        randomize(model, name, seed=ord(name))
    lora.activate(model, trained)
    return model


def grads(model: nn.Module, adapter: str) -> list[Tensor | None]:
    return [p.grad for n, p in model.named_parameters() if f".{adapter}." in n]


def plain(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def non_reentrant(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False)


def reentrant(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=True)


@pytest.mark.parametrize("run", [plain, non_reentrant])
@pytest.mark.parametrize("first", ["a", {"a": 1.0, "b": 0.5}])
def test_a_switch_between_forward_and_backward_raises_and_gives_no_gradient(run, first):
    model = two_adapters(first)
    loss = run(model, X.clone().requires_grad_()).square().sum()
    lora.activate(model, "b")
    with pytest.raises(RuntimeError, match=r"before lora\.activate|different (metadata|number)"):
        loss.backward()
    assert all(g is None for name in "ab" for g in grads(model, name))


def test_switching_off_what_had_no_part_in_a_loss_is_no_fault():
    model = two_adapters(BOTH)
    with lora.activated(model, "b"):
        loss = model(X).square().sum()
    lora.activate(model, "b")
    loss.backward()
    assert all(g is not None for g in grads(model, "b"))


@pytest.mark.parametrize(
    ("at_forward", "at_backward"),
    [
        (CONTEXTS["activated"], nullcontext),
        (CONTEXTS["routed"], nullcontext),
        # As many tensors are saved by these, of the same shapes.
        (lambda model: lora.activated(model, {"a": 2.0, "b": 1.0}), nullcontext),
        (lambda model: lora.routed(model, ["a", "b"]), lambda m: lora.routed(m, ["b", "a"])),
    ],
    ids=["activated", "routed", "another mixture", "other rows"],
)
def test_a_checkpointed_pass_that_runs_again_under_another_adapter_raises(at_forward, at_backward):
    model = two_adapters(BOTH)
    with at_forward(model):
        loss = non_reentrant(model, X.clone().requires_grad_()).square().sum()
    words = "different metadata|different number of tensors"
    with at_backward(model), pytest.raises(RuntimeError, match=words):
        loss.backward()
    assert all(g is None for name in "ab" for g in grads(model, name))


@pytest.mark.parametrize("context", ["activated", "routed"])
@pytest.mark.parametrize("run", [plain, non_reentrant, reentrant, "after"])
def test_a_backward_pass_within_a_context_or_after_it_gives_the_plain_gradients(context, run):
    contexts = {
        "activated": lambda model: lora.activated(model, "b"),
        "routed": lambda model: lora.routed(model, ["b", "b"]),
    }
    model = two_adapters("b")
    model(X).square().sum().backward()
    want = grads(model, "b")
    model = two_adapters(BOTH)
    with contexts[context](model):
        loss = (plain if run == "after" else run)(model, X.clone().requires_grad_()).square().sum()
        if run != "after":
            loss.backward()
    if run == "after":
        loss.backward()
    for got, expected in zip(grads(model, "b"), want, strict=True):
        torch.testing.assert_close(got, expected)
    assert all(g is None for g in grads(model, "a"))


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("trained", ["a", BOTH, {}])
def test_contexts_touch_no_requires_grad(context, trained):
    model = two_adapters(trained)
    before = snapshot(model)
    flags = [p.requires_grad for p in model.parameters()]
    with CONTEXTS[context](model):
        assert [p.requires_grad for p in model.parameters()] == flags
    assert snapshot(model) == before


@pytest.mark.parametrize("policy_first", [True, False])
@pytest.mark.parametrize("run", [plain, non_reentrant, reentrant])
@pytest.mark.parametrize("context", ["disabled", "activated", "merged"])
def test_dpo_has_the_gradients_of_the_plain_form_in_both_orders(context, run, policy_first):
    """A policy, and a reference that is the same model under a context, before or after it."""
    model = two_adapters("a")

    def reference(run=run) -> Tensor:
        with torch.no_grad(), CONTEXTS[context](model):
            return run(model, X)

    before = None if policy_first else reference()
    margin = run(model, X.clone().requires_grad_())
    margin = margin - (reference() if before is None else before)
    (-F.logsigmoid(margin)).sum().backward()
    got = grads(model, "a")
    model = two_adapters("a")
    other = reference(plain)
    (-F.logsigmoid(model(X) - other)).sum().backward()
    for mine, want in zip(got, grads(model, "a"), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-6, atol=1e-7)
