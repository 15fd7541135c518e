"""Both packages' dropout: its rate, its independence, and what a step's random state fixes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import gpt2.fast.dropout
import lora.fast.dropout
from gpt2.model import Dropout

MASKS = {"drawn": lora.fast.dropout.drawn_mask, "hashed": lora.fast.dropout.hashed_mask}


@pytest.fixture(params=MASKS)
def mask(request):
    torch.manual_seed(0)
    return MASKS[request.param]


def off(share: float, p: float, n: int) -> float:
    """How many standard deviations a share of n draws is from its probability."""
    return abs(share - p) / math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_the_rate_is_right_as_a_whole_and_by_row_and_column(mask, p):
    x = torch.empty(512, 768)
    dropped = torch.stack([~mask(x, p) for _ in range(8)]).double()
    assert off(float(dropped.mean()), p, dropped.numel()) < 5
    for axis in (0, 1, 2):  # the same call, row, column over and over
        rest = [a for a in (0, 1, 2) if a != axis]
        shares = dropped.mean(rest)
        n = dropped.numel() / len(shares)
        assert off(float(shares.max()), p, n) < 6
        assert off(float(shares.min()), p, n) < 6


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 8, 64, 767, 768, 1024, 3072, 32768])
def test_elements_are_independent_of_those_after_them(mask, lag):
    kept = torch.cat([mask(torch.empty(256, 1024), 0.5).flatten() for _ in range(4)])
    agree = float((kept[lag:] == kept[:-lag]).double().mean())
    assert off(agree, 0.5, len(kept) - lag) < 5


def test_calls_are_independent_of_each_other(mask):
    kept = [mask(torch.empty(1 << 16), 0.5) for _ in range(40)]
    for i, one in enumerate(kept):
        for other in kept[i + 1 :]:
            assert off(float((one == other).double().mean()), 0.5, len(one)) < 5.5


def test_a_seed_fixes_the_draws(mask):
    x = torch.empty(3, 5, 7)
    torch.manual_seed(1)
    want = mask(x, 0.5)
    torch.manual_seed(1)
    assert mask(x, 0.5).shape == x.shape
    torch.manual_seed(1)
    assert torch.equal(mask(x, 0.5), want)
    assert not torch.equal(mask(x, 0.5), want)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_what_is_kept_is_scaled_so_that_the_mean_stays(p):
    x = torch.full((400, 1000), 3.0, requires_grad=True)
    torch.manual_seed(0)
    y = Dropout(p)(x)
    assert y.detach().unique().tolist() == pytest.approx([0, 3 / (1 - p)])
    assert float(y.mean()) == pytest.approx(3, rel=5e-3)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, (y.detach() != 0) / (1 - p))
    torch.manual_seed(0)
    dropped, keep = lora.fast.dropout.drop(x, p)  # the same draws: each package has its own copy
    assert torch.equal(dropped, y)
    assert torch.equal(keep, y != 0)


def test_nothing_is_dropped_in_eval_mode_or_at_rate_zero():
    x = torch.randn(4, 5)
    assert Dropout(0.5).eval()(x) is x
    assert torch.equal(Dropout(0.0)(x), x)


def test_sizes_that_are_no_multiple_of_four(mask):
    for n in (0, 1, 2, 3, 5):
        assert mask(torch.empty(n), 0.5).shape == (n,)


def test_both_packages_have_the_same_text():
    ours, theirs = (Path(m.__file__).read_bytes() for m in (gpt2.fast.dropout, lora.fast.dropout))
    assert ours == theirs


@pytest.mark.parametrize("p", [1 - 2**-17, 1 - 1e-9, 1.0, 1e-7, 0.9999])
def test_a_rate_that_16_bits_cannot_tell_is_still_the_rate(p):
    torch.manual_seed(0)
    x = torch.ones(1 << 20)
    dropped, keep = lora.fast.dropout.drop(x, p)
    assert dropped.isfinite().all()
    kept = float(keep.double().mean())
    spread = math.sqrt(max(p * (1 - p), 1e-12) / x.numel())
    assert abs(kept - (1 - p)) < 5 * spread + 1e-9
    assert torch.equal(dropped != 0, keep)
    if p < 1 and keep.any():
        assert float(dropped[keep][0]) == pytest.approx(1 / (1 - p), rel=1e-2)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0, 2)])
@pytest.mark.parametrize("p", [0.3, 1 - 1e-9])
def test_no_elements_are_no_trouble(shape, p):
    x = torch.empty(shape, requires_grad=True)
    dropped, keep = lora.fast.dropout.drop(x, p)
    assert dropped.shape == keep.shape == shape
    assert keep.dtype == torch.bool
    dropped.sum().backward()
