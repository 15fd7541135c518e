"""LoRALinear against the formula, written out densely."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import gpt2
import lora
from lora.fast import forms
from lora.fast.dropout import drop
from tests.toys import dense, layer

KINDS = ("linear", "conv1d")
sizes = st.integers(1, 9)


def adapted(kind: str, n_in: int, n_out: int, r: int, **config) -> lora.LoRALinear:
    wrapper = lora.LoRALinear(layer(kind, n_in, n_out, torch.float64))
    settings = {"r": r, "alpha": 3.0, "dropout": 0.0} | config
    update = lora.LowRankUpdate(n_in, n_out, lora.UpdateConfig(**settings), dtype=torch.float64)
    nn.init.normal_(update.A)
    nn.init.normal_(update.B)
    wrapper.updates["default"] = update
    wrapper.activate({"default": 1.0})
    return wrapper


@given(st.sampled_from(KINDS), sizes, sizes, st.integers(1, 4), st.integers(0, 2))
def test_forward_and_gradients_equal_the_dense_form(kind, n_in, n_out, r, leading):
    torch.manual_seed(n_in * 100 + n_out)
    wrapper = adapted(kind, n_in, n_out, r)
    update = wrapper.updates["default"]
    x = torch.randn(*(2, 3)[:leading], n_in, dtype=torch.float64, requires_grad=True)
    y = wrapper(x)
    probe = torch.randn_like(y)
    got = torch.autograd.grad((y * probe).sum(), (x, update.A, update.B))

    a, b = (p.detach().requires_grad_() for p in (update.A, update.B))
    dense_x = x.detach().requires_grad_()
    weight = dense(wrapper.base) + 3.0 / r * b @ a
    expected = F.linear(dense_x, weight, wrapper.base.bias)
    want = torch.autograd.grad((expected * probe).sum(), (dense_x, a, b))
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_with_dropout_replayed(kind):
    wrapper = adapted(kind, 4, 6, 2, dropout=0.5).train()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def forward(x, a, b):
        torch.manual_seed(0)
        factors = {"updates.default.A": a, "updates.default.B": b}
        return torch.func.functional_call(wrapper, factors, (x,))

    update = wrapper.updates["default"]
    assert torch.autograd.gradcheck(forward, (x, update.A, update.B))


def test_dropout_touches_the_update_only_and_only_in_training():
    wrapper, x = adapted("conv1d", 5, 5, 2, dropout=0.5), torch.randn(7, 5, dtype=torch.float64)
    base = wrapper.base(x)
    update = wrapper.updates["default"]
    torch.manual_seed(3)
    noisy = wrapper.train()(x)
    torch.manual_seed(3)
    dropped, _ = drop(x, 0.5)
    torch.testing.assert_close(noisy, base + dropped @ update.A.T @ update.B.T * 1.5)
    torch.testing.assert_close(wrapper.eval()(x), base + x @ update.A.T @ update.B.T * 1.5)


def test_rslora_scales_by_the_root_of_the_rank():
    assert lora.UpdateConfig(r=16, alpha=8, dropout=0, rslora=True).scaling == 2.0
    assert lora.UpdateConfig(r=16, alpha=8, dropout=0).scaling == 0.5


def test_a_layer_is_known_by_its_class_not_its_shape():
    theirs = transformers.pytorch_utils.Conv1D(6, 4)  # (nf, nx)
    for base in (theirs, gpt2.Conv1D(4, 6), nn.Linear(4, 6)):
        assert lora.LoRALinear(base).weight_out_in.shape == (6, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_factors_beside_a_16_bit_base(dtype):
    model = nn.Sequential(layer("conv1d", 8, 8, dtype))
    lora.inject(model, r=2, targets="0", seed=0)
    update = model[0].updates["default"]
    assert update.A.dtype == update.B.dtype == torch.float32
    x = torch.randn(3, 8, dtype=dtype)
    y = model(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert update.B.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(4),
        nn.Conv1d(2, 2, 1),
        nn.MultiheadAttention(4, 2).out_proj,
        nn.Embedding(4, 2, max_norm=1.0),
    ],
)
def test_what_is_no_linear_layer_is_refused(module):
    with pytest.raises(ValueError, match="cannot carry an update"):
        lora.LoRALinear(module)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("wide", [False, True])
def test_the_fast_paths_are_the_readable_one(kind, dtype, dropout, wide, monkeypatch):
    """Outputs and all gradients, at the dtype's own rounding."""
    monkeypatch.setattr(forms, "pays_wide", lambda x, b: wide)
    taken: list[str] = []
    for name in ("add_update", "wide_linear"):
        path = getattr(forms, name)
        monkeypatch.setattr(
            forms, name, lambda *a, name=name, path=path: (taken.append(name), path(*a))[1]
        )
    torch.manual_seed(0)
    wrapper = adapted(kind, 32, 48, 4, dropout=dropout).to(dtype).train()
    wrapper.base.requires_grad_(False)
    update = wrapper.updates["default"]
    x = torch.randn(6, 32, dtype=dtype, requires_grad=True)
    results = []
    for fused in (True, False):
        wrapper.fused = fused
        torch.manual_seed(5)
        y = wrapper(x)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), (x, update.A, update.B))))
    assert taken == ["wide_linear" if wide else "add_update"]
    for fast, readable in zip(*results, strict=True):
        error = (fast.double() - readable.double()).norm() / readable.double().norm()
        assert error < 4 * torch.finfo(dtype if dtype.itemsize < 8 else torch.float32).eps


def test_a_mixture_takes_the_fast_path_too_and_trains_the_base_beside_it():
    """Each update is added on its own, whatever else learns."""
    torch.manual_seed(0)
    wrapper = adapted("linear", 8, 6, 2)
    wrapper.updates["other"] = adapted("linear", 8, 6, 3).updates["default"]
    wrapper.activate({"default": 0.7, "other": -0.2})
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    leaves = [x, *wrapper.parameters()]
    results = []
    for fused in (True, False):
        wrapper.fused = fused
        y = wrapper(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for fast, readable in zip(*results, strict=True):
        torch.testing.assert_close(fast, readable, rtol=1e-12, atol=1e-12)


def test_the_fast_path_keeps_the_input_once_and_dropout_as_bytes():
    wrapper = adapted("conv1d", 64, 96, 4, dropout=0.5).to(torch.bfloat16).train()
    wrapper.base.requires_grad_(False)
    x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(t):
        if not isinstance(t, nn.Parameter) and t.data_ptr() != wrapper.base.weight.data_ptr():
            kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        wrapper(x)
    assert sum(kept.values()) == 32 * 64 * 2 + 32 * 64 + 32 * 4 * 2  # x, mask, h
