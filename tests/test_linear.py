"""The sliced product: F.linear's values and gradients, for any number of threads and sizes."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import lora
from gpt2.fast import products
from gpt2.fast.products import linear
from tests.toys import untie

sizes = st.integers(1, 9)


@given(sizes, sizes, st.integers(0, 3), st.integers(1, 4), st.booleans(), st.booleans())
def test_it_is_torchs_linear(n_in, n_out, axes, threads, transposed, biased):
    torch.manual_seed(n_in * 10 + n_out)
    x = torch.randn(*(2, 3, 1)[:axes], n_in, requires_grad=True)
    weight = torch.randn(n_in, n_out).t() if transposed else torch.randn(n_out, n_in)
    leaves = [x, weight.requires_grad_(), *([torch.randn(n_out).requires_grad_()] * biased)]
    before, whole = torch.get_num_threads(), products.WHOLE
    torch.set_num_threads(threads)
    products.WHOLE = 0
    try:
        results = [(y := f(*leaves), *torch.autograd.grad(y.square().sum(), leaves))
                   for f in (linear, F.linear)]  # fmt: skip
    finally:
        torch.set_num_threads(before)
        products.WHOLE = whole
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [(0,), (2, 0), (5,)])
def test_a_large_weight_is_sliced_in_float32_only_and_no_rows_are_taken_too(rows, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    calls: list[int] = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: (calls.append(a.dim()), matmul(a, b))[1]
    )
    cases = (27, torch.float32, [3, 2]), (27, torch.float64, []), (27, torch.bfloat16, [])
    for whole, dtype, expected in (*cases, (28, torch.float32, [])):
        calls.clear()
        monkeypatch.setattr(products, "WHOLE", whole)
        y = linear(torch.ones(*rows, 4, dtype=dtype), torch.ones(7, 4, dtype=dtype))
        assert y.shape == (*rows, 7)
        assert calls == expected


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [(1, 1), (1, 7), (5, 1)])
def test_a_models_logits_are_its_heads_to_the_bit(demo, rows, threads):
    """An adapter on the head, which calls it, changes nothing at birth."""
    torch.set_num_threads(threads)
    idx = torch.randint(50257, rows, generator=torch.Generator().manual_seed(0))
    model = copy.deepcopy(demo)
    with torch.no_grad():
        want = model(idx)
        untie(model.lm_head)
        lora.inject(model, targets="lm_head", dropout=0.1)
        assert torch.equal(model(idx), want)
