"""Contexts and training: what a late backward pass gives, checkpointed or not; DPO by hand."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lora
from tests.toys import MLP, randomize, snapshot

X = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
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
    model = two_adapters({"a": 1.0, "b": 1.0})
    with lora.activated(model, "b"):
        loss = model(X).square().sum()
    lora.activate(model, "b")
    loss.backward()
    assert all(g is not None for g in grads(model, "b"))


@pytest.mark.parametrize("context", ["activated", "routed"])
def test_a_checkpointed_pass_that_runs_again_under_another_adapter_raises(context):
    model = two_adapters({"a": 1.0, "b": 1.0})
    with CONTEXTS[context](model):
        loss = non_reentrant(model, X.clone().requires_grad_()).square().sum()
    with pytest.raises(RuntimeError, match="different metadata|different number of tensors"):
        loss.backward()
    assert all(g is None for name in "ab" for g in grads(model, name))


@pytest.mark.parametrize(
    ("at_forward", "at_backward"),
    [
        (lambda model: lora.activated(model, {"a": 2.0, "b": 1.0}), lambda _: nullcontext()),
        (
            lambda model: lora.routed(model, ["a", "b"]),
            lambda model: lora.routed(model, ["b", "a"]),
        ),
    ],
    ids=["activated", "routed"],
)
def test_a_checkpointed_pass_that_runs_again_under_another_mixture_raises(at_forward, at_backward):
    """As many tensors are saved then, of the same shapes."""
    model = two_adapters({"a": 1.0, "b": 1.0})
    with at_forward(model):
        loss = non_reentrant(model, X.clone().requires_grad_()).square().sum()
    with at_backward(model), pytest.raises(RuntimeError, match="different metadata"):
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
    model = two_adapters({"a": 1.0, "b": 1.0})
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
@pytest.mark.parametrize("trained", ["a", {"a": 1.0, "b": 1.0}, {}])
def test_contexts_touch_no_requires_grad(context, trained):
    model = two_adapters(trained)
    before = snapshot(model)
    flags = [p.requires_grad for p in model.parameters()]
    with CONTEXTS[context](model):
        assert [p.requires_grad for p in model.parameters()] == flags
    assert snapshot(model) == before


# DPO: a policy, and a reference that is the same model under a context


def dpo_gradients(context, run, policy_first: bool) -> list[Tensor]:
    """The gradients of the loss with the reference's pass before or after the policy's."""
    model = two_adapters("a")

    def reference() -> Tensor:
        with torch.no_grad(), context(model):
            return run(model, X)

    before = None if policy_first else reference()
    policy = run(model, X.clone().requires_grad_())
    margin = policy - (reference() if before is None else before)
    (-F.logsigmoid(margin)).sum().backward()
    return grads(model, "a")


@pytest.mark.parametrize("policy_first", [True, False])
@pytest.mark.parametrize("run", [plain, non_reentrant, reentrant])
@pytest.mark.parametrize("context", ["disabled", "activated", "merged"])
def test_dpo_has_the_gradients_of_the_plain_form_in_both_orders(context, run, policy_first):
    got = dpo_gradients(CONTEXTS[context], run, policy_first)
    model = two_adapters("a")
    with torch.no_grad(), CONTEXTS[context](model):
        reference = model(X)
    (-F.logsigmoid(model(X) - reference)).sum().backward()
    for mine, want in zip(got, grads(model, "a"), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-6, atol=1e-7)
