"""What adapters train whole: copies of modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora
from tests.toys import adapted, raw, refused


class Classifier(nn.Module):
    """A body with a LayerNorm, and a head of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.score = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(self.norm(torch.tanh(self.up(x))))


def classifier() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier().double().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    return model


X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def shift(model: nn.Module, adapter: str, by: float) -> None:
    """Train, in a way, all that an adapter trains."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"updates.{adapter}." in name and parameter.requires_grad:
                parameter.add_(by)


def test_an_adapter_trains_a_copy_of_a_head_and_the_base_keeps_its_own():
    model, base = classifier(), raw(classifier()(X))
    before = {key: raw(tensor) for key, tensor in model.state_dict().items()}
    paths = lora.inject(model, r=2, targets="up", modules_to_save="score", seed=0)
    assert paths == ["up", "score"]
    assert raw(model(X)) == base
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        "up.updates.default.A",
        "up.updates.default.B",
        "score.updates.default.0.weight",
        "score.updates.default.0.bias",
        "score.updates.default.1.weight",
    }
    model(X).square().sum().backward()
    assert all(p.grad is not None for p in lora.trainable_parameters(model))
    shift(model, "default", 0.5)
    assert raw(model(X)) != base
    with lora.disabled(model):
        assert raw(model(X)) == base
    assert {k: raw(t) for k, t in lora.base_state_dict(model).items()} == before
    head = model.score
    with pytest.raises(ValueError, match="trains more than factors: a copy of score"):
        lora.algebra.factors(model)
    lora.eject(model)
    assert model.score is head.base
    assert raw(model(X)) == base


def test_each_adapter_has_its_own_copy_and_copies_have_no_mixture():
    model = classifier()
    for name in "ab":
        lora.inject(model, r=1, targets="up", modules_to_save="score", adapter=name, seed=0)
        shift(model, name, 0.1 if name == "a" else 0.2)
    alone = {}
    for name in "ab":
        lora.activate(model, name)
        alone[name] = raw(model(X))
    assert alone["a"] != alone["b"]
    lora.inject(model, r=1, targets="up", adapter="c", seed=0)
    lora.activate(model, {"a": 1.0, "c": 0.5})  # one copy, and any mixture beside it
    for mixture in ({"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 1.0}, {"a": 0.5}):
        with refused(model, "train copies of score, which have no mixture"):
            lora.activate(model, mixture)
    with refused(model, "score is trained whole", RuntimeError):
        lora.routed(model, ["a"] * 3).__enter__()
    with lora.activated(model, "b"):
        assert raw(model(X)) == alone["b"]
    lora.remove(model, "b")
    lora.activate(model, "a")
    assert raw(model(X)) == alone["a"]
    twin = copy.deepcopy(model)
    assert raw(twin(X)) == alone["a"]


def test_merging_for_good_keeps_the_copies():
    model = classifier()
    adapted(model, targets="up", modules_to_save="score")
    shift(model, "default", 0.3)
    want = model(X)
    with lora.merged(model):
        torch.testing.assert_close(model(X), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(model(X), want)
    lora.eject(model, merge=True)
    torch.testing.assert_close(model(X), want, rtol=1e-12, atol=1e-12)
    assert set(model.state_dict()) == set(classifier().state_dict())


def test_the_state_dict_has_the_bases_own_keys_and_loads_back():
    model, plain = classifier(), classifier()
    lora.inject(model, r=2, targets="up", modules_to_save="score", seed=0)
    keys = list(model.state_dict())
    assert [key for key in keys if ".updates." not in key] == list(plain.state_dict())
    shift(model, "default", 1.0)
    twin = classifier()
    lora.inject(twin, r=2, targets="up", modules_to_save="score", seed=3)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(X), model(X))
    missing, left_over = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all(".updates." in key for key in left_over)
