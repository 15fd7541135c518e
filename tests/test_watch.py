"""What a caller does to a model between two steps: seen, or of no effect."""

from __future__ import annotations

import copy
from timeit import repeat

import pytest
import torch
from torch import Tensor, nn

import lora
from gpt2 import TrainConfig, train
from gpt2.training.watch import Watch
from tests.runs import DATA, model_of, weights


class Part(nn.Module):
    """A layer with state of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(64))
        self.active: dict[str, float] = {"default": 1.0}
        self.disabled = 0
        self.routing = None
        self.factors = [1.0]
        self.merged: Tensor | None
        self.register_buffer("merged", None)
        self.calls = 0
        self.act = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1  # a model may count its own calls
        return self.act(x @ self.weight)


class Toy(nn.Module):
    """A model from ids to logits whose one part is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 64).requires_grad_(False)
        self.parts = nn.ModuleList([Part()])

    def forward(self, idx: Tensor) -> Tensor:
        return self.parts[0](self.table(idx))


def part(model: Toy) -> Part:
    return model.parts[0]


CHANGES = {
    "a dictionary in place": (r"parts\.0", lambda m: part(m).active.update(default=0.5)),
    "a dictionary": (r"parts\.0", lambda m: setattr(part(m), "active", {"other": 1.0})),
    "a counter": (r"parts\.0", lambda m: setattr(part(m), "disabled", 1)),
    "a function": (r"parts\.0", lambda m: setattr(part(m), "routing", len)),
    "a list in place": (r"parts\.0", lambda m: part(m).factors.append(2.0)),
    "a buffer": (r"parts\.0", lambda m: setattr(part(m), "merged", torch.eye(64))),
    "an attribute less": (r"parts\.0", lambda m: delattr(part(m), "disabled")),
    "a child": (r"parts\.0", lambda m: setattr(part(m), "act", nn.Tanh())),
    "a frozen child above": ("the model", lambda m: setattr(m, "table", nn.Embedding(64, 64))),
    "a layer": ("parts", lambda m: m.parts.__setitem__(0, Part())),
    "memory": ("the trained parameters", lambda m: setattr(part(m).weight, "data", torch.eye(64))),
    "a parameter": (
        r"parts\.0",
        lambda m: setattr(part(m), "weight", nn.Parameter(torch.eye(64))),
    ),
    "frozen": ("the trained parameters", lambda m: part(m).weight.requires_grad_(False)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_steps_is_an_error(change):
    model, (said, make) = Toy(), CHANGES[change]
    steps = train(model, DATA, TrainConfig(steps=4, lr=1e-3))
    next(steps)
    next(steps)
    make(model)
    with pytest.raises(RuntimeError, match=f"changed between two steps: .*{said}.* call train ag"):
        next(steps)


def test_what_the_model_or_a_callers_context_changes_is_none():
    model, left = Toy(), Toy()
    left.load_state_dict(model.state_dict())
    list(train(left, DATA, TrainConfig(steps=4, lr=1e-3)))
    for _ in train(model, DATA, TrainConfig(steps=4, lr=1e-3)):
        p, before = part(model), part(model).active
        p.disabled, p.active, p.merged = p.disabled + 1, {}, torch.eye(64)
        model.eval()
        p.register_forward_hook(lambda *_: None)
        p.note = "new"
        p.disabled, p.active, p.merged = p.disabled - 1, dict(before), None
    assert weights(model) == weights(left)
    assert part(model).calls == 4


def test_a_gradient_that_a_caller_leaves_before_or_between_steps_does_not_count():
    model, left = model_of(adapter=True), model_of(adapter=True)
    list(train(left, DATA, TrainConfig(steps=3, lr=1e-2)))
    idx = torch.arange(8)[None]
    model(idx, idx).backward()
    for _ in train(model, DATA, TrainConfig(steps=3, lr=1e-2)):
        assert all(p.grad is None for p in model.parameters())
        model(idx, idx).backward()
    assert weights(model) == weights(left)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: lora.eject(m),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.transformer.h[0].requires_grad_(False),
    ],
    ids=["eject", "bfloat16", "frozen"],
)
def test_an_adapter_that_goes_is_an_error(change):
    model = model_of(adapter=True)
    steps = train(model, DATA, TrainConfig(steps=4, lr=1e-3))
    next(steps)
    change(model)
    with pytest.raises(RuntimeError, match="changed between two steps"):
        next(steps)


@pytest.mark.parametrize("off", [lora.disabled, lora.merged])
def test_an_adapter_that_is_off_is_an_error_and_on_again_is_not(off):
    model, left = model_of(adapter=True), model_of(adapter=True)
    list(train(left, DATA, TrainConfig(steps=3, lr=1e-3)))
    steps = train(model, DATA, TrainConfig(steps=3, lr=1e-3))
    for _ in steps:
        with off(model):
            model(torch.arange(8)[None])
    assert weights(model) == weights(left)
    steps = train(model, DATA, TrainConfig(steps=3, lr=1e-3))
    next(steps)
    with off(model), pytest.raises(RuntimeError, match="changed between two steps"):
        next(steps)


def test_looking_is_cheap(demo):
    model = copy.deepcopy(demo)
    lora.inject(model, r=8)
    watch = Watch(model, lora.trainable_parameters(model))
    assert min(repeat(watch.check, number=200, repeat=5)) / 200 < 30e-6
