"""The same on other models and in other states: transformers, Llama's shape, meta, faults."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora
from tests.folders import llama
from tests.toys import MLP, adapted, layer, randomize, raw, refused, snapshot, tiny_gpt2, twin

IDX = torch.randint(0, 31, (3, 7), generator=torch.Generator().manual_seed(0))
ROWS = ["a", None, {"a": 0.5, "b": 2.0}]


MODELS = {"ours": tiny_gpt2, "transformers": lambda: twin(tiny_gpt2()), "llama": llama}
models = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output = model(IDX)
    return getattr(output, "logits", output)


def bank(build) -> nn.Module:
    model = build()
    adapted(model, targets="all-linear", adapter="a", rslora=True, values=0)
    return adapted(model, targets="all-linear", adapter="b", r=3, alpha=5, layers=[1])


@models
def test_the_whole_life_of_a_bank(build, tmp_path):
    """Merged, routed, saved, loaded, removed, ejected: the same promises on any model."""
    model, base = bank(build), logits(build())
    alone = {}
    for name in "ab":
        lora.activate(model, name)
        alone[name] = logits(model)
        lora.save(model, tmp_path / name, adapter=name)
        lora.merge(model)
        assert torch.equal(logits(model).argmax(-1), alone[name].argmax(-1))
        torch.testing.assert_close(logits(model), alone[name], rtol=1e-4, atol=1e-4)
        lora.unmerge(model)
        assert torch.equal(logits(model), alone[name])
    with lora.activated(model, ROWS[2]):
        mixed = logits(model)
    with lora.routed(model, ROWS):
        rows = logits(model)
    for got, want in zip(rows, (alone["a"][0], base[1], mixed[2]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with lora.disabled(model):
        assert torch.equal(logits(model), base)
    lora.eject(model)
    assert torch.equal(logits(model), base)
    for name in "ba":
        lora.load(model, tmp_path / name, adapter=name)
        assert torch.equal(logits(model), alone[name])
    twin = copy.deepcopy(model)
    lora.remove(twin, "a")
    lora.remove(twin, "b")
    assert torch.equal(logits(twin), base)
    assert torch.equal(logits(model), alone["a"])


def test_transformers_generates_under_routing():
    model = bank(MODELS["transformers"])
    config = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        with lora.routed(model, ROWS):
            together = model.generate(IDX, **config)
        for row, mixture in enumerate(ROWS):
            with lora.activated(model, mixture or {}):
                assert torch.equal(model.generate(IDX[row : row + 1], **config)[0], together[row])


# Other states


def test_a_deepcopy_shares_nothing_and_knows_what_was_trainable():
    model = tiny_gpt2()
    model.transformer.wpe.weight.requires_grad_(False)
    lora.inject(model, r=2, targets=("c_attn", "mlp.c_proj"))
    randomize(model)
    want = raw(logits(model))
    twin = copy.deepcopy(model)
    mine = {p.data_ptr() for p in model.parameters()}
    assert not mine & {p.data_ptr() for p in twin.parameters()}
    randomize(twin, seed=9)
    lora.eject(twin, merge=True)
    assert raw(logits(model)) == want
    frozen = {n for n, p in twin.named_parameters() if not p.requires_grad}
    assert frozen == {"transformer.wpe.weight"}
    other = copy.deepcopy(model)
    lora.eject(other)
    assert other.lm_head.weight is other.transformer.wte.weight
    assert other.lm_head.weight is not model.transformer.wte.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_is_cast_after_injection(dtype):
    model = adapted(targets=("c_attn[q,v]", "c_fc"))
    want = logits(model)
    model.to(dtype)
    got = logits(model)
    assert got.dtype == dtype
    assert (got.double() - want).norm() < 0.1 * want.norm()
    lora.merge(model)
    lora.unmerge(model)
    assert torch.equal(logits(model), got)
    lora.eject(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_with_the_names_of_an_adapters_parts_and_a_layer_called_twice(tmp_path):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A = nn.Parameter(torch.ones(4))
            self.base = nn.Linear(4, 4)
            self.updates = nn.ModuleDict({"base": nn.Linear(4, 4), "default": self.base})

        def forward(self, x: Tensor) -> Tensor:
            return self.updates["base"](self.updates["default"](self.base(x * self.A)))

    torch.manual_seed(0)
    model = Odd()
    names = set(model.state_dict())
    x = torch.randn(2, 4)
    base = raw(model(x))
    for name, r in (("a", 1), ("b", 2)):
        adapted(model, r=r, targets="base", adapter=name, values=r)
    assert isinstance(model.updates["base"], lora.LoRALinear)
    assert model.base is model.updates["default"]
    assert set(lora.base_state_dict(model)) == names
    want = model(x)
    lora.save(model, tmp_path, adapter="b")
    lora.remove(model, "b")
    lora.load(model, tmp_path, adapter="b")
    assert torch.equal(model(x), want)
    with lora.merged(model):
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    lora.eject(model)
    assert raw(model(x)) == base
    assert set(model.state_dict()) == names


def test_through_data_parallel_and_compile_wrappers(tmp_path):
    model = tiny_gpt2()
    wrapped = nn.DataParallel(torch.compile(model))
    adapted(wrapped, adapter="a")
    lora.save(wrapped, tmp_path, adapter="a")
    lora.load(wrapped, tmp_path, adapter="b")
    idx = IDX.to(model.lm_head.weight.device)  # where there is a GPU, DataParallel moved it there
    base = tiny_gpt2().to(idx.device)
    with torch.no_grad():
        lora.activate(wrapped, {"a": 1.0, "b": -1.0})
        lora.merge(wrapped)
        torch.testing.assert_close(model(idx), base(idx))
        lora.unmerge(wrapped)
        with lora.disabled(wrapped):
            assert torch.equal(model(idx), base(idx))
    assert list(lora.adapters(wrapped)) == ["a", "b"]
    assert set(lora.base_state_dict(wrapped)) == set(base.state_dict())
    lora.remove(wrapped, "b")
    lora.eject(wrapped)
    assert not any(isinstance(module, lora.LoRALinear) for module in model.modules())


def test_a_compiled_model_is_right_after_each_switch():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(layer("conv1d", 6, 6), nn.Tanh(), layer("linear", 6, 4)).eval()
    for name, r in (("a", 1), ("b", 3)):
        adapted(model, r=r, targets=("0", "2"), adapter=name, values=r)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 6)
    with torch.no_grad():
        for mixture in ("a", "b", {"a": 0.5, "b": 0.5}, {}, "a"):
            lora.activate(model, mixture)
            torch.testing.assert_close(compiled(x), model(x))
            with lora.merged(model):
                torch.testing.assert_close(compiled(x), model(x))
            with lora.disabled(model):
                torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


# Faults at any point


class FailAt(TorchDispatchMode):
    """The n-th operation on a tensor runs out of memory."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("injected")
        return func(*args, **(kwargs or {}))


def tied_pair() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), MLP(4, 5), nn.Linear(4, 9, bias=False)).eval()
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("call", ["inject", "load", "implant", "merge", "eject", "routed"])
def test_a_fault_at_any_tensor_changes_nothing(call, tmp_path):
    def build() -> nn.Module:
        model = tied_pair()
        return model if call == "inject" else adapted(model, r=1, targets="up", adapter="here")

    donor = adapted(tied_pair(), targets=("up", "down"))
    lora.save(donor, tmp_path)
    value = lora.algebra.factors(donor)
    calls = {
        "inject": lambda m: lora.inject(m, r=1, targets=("up", "down"), seed=0),
        "load": lambda m: lora.load(m, tmp_path),
        "implant": lambda m: lora.algebra.implant(m, value),
        "merge": lora.merge,
        "eject": lora.eject,
        "routed": lambda m: lora.routed(m, ["here", None]).__enter__(),
    }
    n = 0
    while True:
        n += 1
        model = build()
        before = snapshot(model)
        try:
            with FailAt(n) as fault:
                calls[call](model)
        except Exception:  # safetensors turns it into another
            assert fault.left <= 0
            assert snapshot(model) == before, f"operation {n}"
        else:
            assert fault.left > 0
            break
    assert n > 1 or call == "eject"


@pytest.mark.parametrize("method", ["set_factors", "__init__"])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_a_fault_at_any_layer_changes_nothing(method, n, tmp_path, monkeypatch):
    lora.save(bank(tiny_gpt2), tmp_path, adapter="a")
    model = adapted(r=1, adapter="here")
    owner = lora.LowRankUpdate if method == "set_factors" else lora.LoRALinear
    right, calls = getattr(owner, method), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) > n:
            raise MemoryError("injected")
        return right(*args, **kwargs)

    monkeypatch.setattr(owner, method, failing)
    with refused(model, "injected", MemoryError):
        lora.load(model, tmp_path)
