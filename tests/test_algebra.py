"""Arithmetic on adapters: each identity, for any ranks and scalings, on the deltas themselves."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora
from lora import algebra
from lora.algebra import Factors
from tests.folders import edit, peft_model
from tests.toys import IDX, MLP, adapted, deltas, raw, refused, tiny_gpt2, twin

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SHAPES = {"up": (5, 4), "down": (4, 7), "side": (3, 3)}  # out, in


@st.composite
def values(draw) -> dict[str, Factors]:
    """An adapter on some of the layers, of any ranks, also ones above the layer's own."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    paths = draw(st.sets(st.sampled_from(list(SHAPES)), min_size=1))
    value = {}
    for path in sorted(paths):
        r = draw(st.integers(1, 6))
        n_out, n_in = SHAPES[path]
        a = torch.randn(r, n_in, generator=generator, dtype=torch.float64)
        value[path] = Factors(a, torch.randn(n_out, r, generator=generator, dtype=torch.float64))
    return value


def same(got: dict[str, Factors], want: dict[str, torch.Tensor], **tolerance) -> None:
    dense = deltas(got)
    assert dense.keys() == want.keys()
    for path, delta in want.items():
        torch.testing.assert_close(dense[path], delta, **(tolerance or EXACT))


def summed(*weighted: tuple[dict[str, Factors], float]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for value, weight in weighted:
        for path, pair in value.items():
            zero = torch.zeros(SHAPES[path], dtype=torch.float64)
            total[path] = total.get(path, zero) + weight * (pair.B @ pair.A)
    return total


def ones(n_in: int, n_out: int, r: int = 1, by: float = 1.0) -> Factors:
    return Factors(torch.full((r, n_in), by), torch.ones(n_out, r))


weights = st.floats(-3, 3)


@given(values(), values(), values(), weights)
def test_the_identities(a, b, c, w):
    same(algebra.add(a, b), summed((a, 1), (b, 1)))
    same(algebra.add(b, a), deltas(algebra.add(a, b)))
    same(algebra.add(algebra.add(a, b), c), deltas(algebra.add(a, algebra.add(b, c))))
    same(
        algebra.scale(algebra.add(a, b), w),
        deltas(algebra.add(algebra.scale(a, w), algebra.scale(b, w))),
    )
    same(algebra.scale(algebra.scale(a, w), 0.5), summed((a, w / 2)))
    same(algebra.subtract(a, b), summed((a, 1), (b, -1)))
    same(algebra.subtract(a, a), summed((a, 0)))
    same(algebra.subtract(algebra.add(a, b), b), summed((a, 1), (b, 0)))
    mixture = algebra.add(algebra.scale(a, w), algebra.scale(b, 0.3), algebra.scale(c, -1))
    same(mixture, summed((a, w), (b, 0.3), (c, -1)))
    same(algebra.scale(a, 1), deltas(a))


@given(values(), values())
def test_arguments_are_left_alone_and_nothing_is_shared_by_change(a, b):
    before = {p: (raw(q.A), raw(q.B)) for p, q in a.items()}
    algebra.add(a, b)
    algebra.scale(a, 3)
    algebra.compress(a, 1)
    algebra.ties([a, b], 0.5)
    algebra.dare([a, b], 0.5, seed=0)
    assert {p: (raw(q.A), raw(q.B)) for p, q in a.items()} == before


@given(values(), st.integers(1, 8))
def test_compress_is_the_best_of_its_rank_and_says_the_error(value, r):
    small = algebra.compress(value, r)
    for path, pair in value.items():
        delta = pair.delta()
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
        best = (u[:, :r] * s[:r]) @ vt[:r]
        got = small.adapter[path]
        assert got.r <= r
        made = (got.delta() - delta).norm() / delta.norm()
        assert made <= (best - delta).norm() / delta.norm() + 1e-9  # Eckart-Young
        assert small.errors[path] == pytest.approx(made.item(), abs=1e-7)
        if r >= min(delta.shape):
            torch.testing.assert_close(got.delta(), delta, **EXACT)


def test_compress_forms_no_dense_delta():
    """A delta of these sizes would take 80 GB."""
    big = {"x": Factors(torch.randn(4, 100_000).double(), torch.randn(100_000, 4).double())}
    small = algebra.compress(big, 2)
    assert small.adapter["x"].A.shape == (2, 100_000)
    twice = algebra.compress(algebra.add(big, big), 4)
    assert twice.errors["x"] < 1e-7


def test_the_error_of_nothing_is_nothing():
    zero = {"up": Factors(torch.zeros(2, 4).double(), torch.zeros(5, 2).double())}
    assert algebra.compress(zero, 1).errors == {"up": 0.0}
    assert not algebra.compress(zero, 1).adapter["up"].delta().any()


def test_layers_of_other_shapes_are_refused_by_name():
    a, b = {"up": ones(4, 5), "x": ones(2, 2)}, {"up": ones(5, 5), "x": ones(2, 3)}
    for call in (algebra.add, algebra.subtract, lambda *v: algebra.ties(v, 0.5)):
        with pytest.raises(
            ValueError, match=r"up: \(5, 4\) and \(5, 5\); x: \(2, 2\) and \(3, 2\)"
        ):
            call(a, b)


# To and from models, folders, tuned models


def bank(dtype: torch.dtype = torch.float64) -> nn.Module:
    model = adapted(
        tiny_gpt2(dtype=dtype), alpha=3, targets="c_attn[q,v]", rslora=True, adapter="a"
    )
    more = {"r": 5, "alpha": 7, "targets": ("c_attn", "wpe"), "rslora": True, "values": 2}
    return adapted(model, adapter="b", **more)


@pytest.mark.parametrize("name", ["a", "b"])
def test_saved_and_live_adapters_have_one_value(tmp_path, name):
    model = bank()
    live = algebra.factors(model, name)
    lora.save(model, tmp_path, adapter=name)
    same(algebra.read(tmp_path), deltas(live))


def test_implanting_a_combination_is_activating_the_mixture():
    model = bank()
    value = algebra.add(
        algebra.scale(algebra.factors(model, "a"), 0.7),
        algebra.scale(algebra.factors(model, "b"), -0.3),
    )
    lora.activate(model, {"a": 0.7, "b": -0.3})
    want = model(IDX)
    algebra.implant(model, value, "both")
    assert lora.active(model) == {"both": 1.0}
    torch.testing.assert_close(model(IDX), want, rtol=1e-10, atol=1e-10)
    same(algebra.factors(model, "both"), deltas(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_implant_rounds_to_the_dtype_of_the_factors_and_no_more(dtype):
    value = algebra.factors(bank(), "b")
    model = tiny_gpt2(dtype=dtype)
    algebra.implant(model, value)
    back = algebra.factors(model)  # float32 factors beside a 16-bit base
    for path, pair in value.items():
        assert torch.equal(back[path].A, pair.A.float().double())
        assert torch.equal(back[path].B, pair.B.float().double())


A_PATH = "transformer.h.0.attn.c_attn"


@pytest.mark.parametrize(
    ("path", "pair", "words"),
    [
        (None, None, "the adapter is empty"),
        ("nowhere", ones(16, 48), "nowhere: no such layer here"),
        ("transformer.ln_f", ones(16, 16), "transformer.ln_f: it is no nn.Linear"),
        ("transformer", ones(16, 16), "transformer: it is no nn.Linear"),
        (A_PATH, ones(1, 48, r=2), r"lora_A is \(2, 1\), this layer takes \(2, 16\)"),
        (A_PATH, ones(48, 16, r=2), "lora_A is .*; lora_B is"),
        (A_PATH, ones(16, 48, r=17), "r 17 is above 16"),
        (A_PATH, ones(16, 48, r=0), "r must be at least 1"),
        (A_PATH, ones(16, 48, by=torch.inf), "lora_A has NaN or infinite"),
        ("lm_head", ones(16, 61), "are one tensor"),
    ],
)
def test_values_that_cannot_be_implanted(path, pair, words):
    model = tiny_gpt2()
    with refused(model, words):
        algebra.implant(model, {path: pair} if path else {})


@pytest.mark.parametrize("kind", ["mlp", "gpt2"])
def test_extract_recovers_a_low_rank_fine_tune(kind):
    torch.manual_seed(0)
    base = MLP(6, 9).double() if kind == "mlp" else tiny_gpt2(dtype=torch.float64)
    tuned = adapted(copy.deepcopy(base), r=3, targets="all-linear")
    x = torch.randn(4, 6).double() if kind == "mlp" else IDX
    want, changes = tuned(x), deltas(algebra.factors(tuned))
    lora.eject(tuned, merge=True)
    extracted = algebra.extract(base, tuned, 3)
    assert max(extracted.errors.values()) < 1e-12
    same(extracted.adapter, changes, rtol=1e-9, atol=1e-9)
    algebra.implant(base, extracted.adapter)
    torch.testing.assert_close(base(x), want, rtol=1e-8, atol=1e-8)
    lora.eject(base)
    assert min(algebra.extract(base, tuned, 2).errors.values()) > 1e-3


def test_what_cannot_be_extracted():
    with pytest.raises(ValueError, match="The tuned model has no"):
        algebra.extract(tiny_gpt2(), MLP(), 2)
    with pytest.raises(ValueError, match=r"up: \(6, 6\) and \(9, 6\)"):
        algebra.extract(MLP(), MLP(6, 9), 2)
    with pytest.raises(ValueError, match="r must be"):
        algebra.extract(MLP(), MLP(), 0)


def test_half_a_pair_cannot_be_read(tmp_path):
    model = bank()
    lora.save(model, tmp_path, adapter="a")
    edit(tmp_path, lambda t: t.pop(f"base_model.model.{A_PATH}.lora_B.weight"))
    with pytest.raises(ValueError, match=f"{A_PATH} has no lora_B"):
        algebra.read(tmp_path)


# Recipes


def column(*entries: float) -> dict[str, Factors]:
    """An adapter whose delta is these entries."""
    return {"x": Factors(torch.ones(1, 1).double(), torch.tensor([entries], dtype=torch.float64).T)}


def test_ties_trims_elects_and_averages():
    """By hand: keep the 2 largest of 4; the sign with more mass wins; mean over its followers."""
    a, b = column(4, -3, 1, 0.5), column(2, 5, 0.1, -6)
    merged = algebra.ties([a, b], 0.5)["x"].flatten()
    assert merged.tolist() == [4, 5, 0, -6]
    assert algebra.ties([a, b], 1.0)["x"].flatten().tolist() == [3, 5, 0.55, -6]
    weighted = algebra.ties([a, b], 1.0, [1.0, 0.5])["x"].flatten()
    assert weighted.tolist() == [2.5, -3, 0.525, -3]


@given(values(), st.floats(0.01, 1))
def test_ties_of_one_keeps_the_largest_entries(value, density):
    for path, merged in algebra.ties([value], density).items():
        delta = value[path].delta()
        kept = math.ceil(density * delta.numel())
        assert merged.count_nonzero() == kept
        assert torch.equal(merged, torch.where(merged != 0, delta, 0.0))
        assert merged.abs().sum() == pytest.approx(
            delta.abs().flatten().topk(kept).values.sum().item()
        )


@given(values(), values())
def test_at_full_density_ties_of_equals_and_dare_are_the_sum(a, b):
    for path, merged in algebra.ties([a, a, a], 1.0).items():
        torch.testing.assert_close(merged, a[path].delta(), **EXACT)
    sums = summed((a, 2), (b, -1))
    for path, merged in algebra.dare([a, b], 1.0, [2, -1], seed=0).items():
        torch.testing.assert_close(merged, sums[path], **EXACT)


def test_dare_keeps_the_mean_and_follows_its_seed():
    value = column(*range(1, 9))
    drawn = torch.stack([algebra.dare([value], 0.25, seed=s)["x"] for s in range(2000)])
    want = value["x"].delta()
    assert ((drawn == 0) | torch.isclose(drawn, 4 * want)).all()
    share = (drawn != 0).double().mean().item()
    assert share == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(drawn.mean(0), want, rtol=0.2, atol=0)  # 2000 draws: sd 4 %
    assert torch.equal(algebra.dare([value], 0.25, seed=7)["x"], drawn[7])
    two = algebra.dare([value | {"y": value["x"]}], 0.25, seed=7)
    assert not torch.equal(two["x"], two["y"])  # each layer has a draw of its own
    before = torch.get_rng_state()
    algebra.dare([value], 0.25, seed=7)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("recipe", [algebra.ties, lambda *a: algebra.dare(*a, seed=0)])
def test_recipes_refuse(recipe):
    value = column(1, 2)
    for density in (0, -1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="density must be"):
            recipe([value], density)
    for given_weights in ([], [1, 2]):
        with pytest.raises(ValueError, match="shorter|longer"):
            recipe([value], 0.5, given_weights)


# PEFT


@settings(max_examples=5, deadline=None)
@given(st.tuples(weights, weights), st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_a_weighted_sum_is_pefts_cat_where_it_is_exact(tmp_path_factory, scale, ranks):
    """PEFT's "cat" takes the root of a negative weight's size; for all above 0 it is ours."""
    scale = tuple(abs(w) + 0.1 for w in scale)
    folder = tmp_path_factory.mktemp("cat")
    model = tiny_gpt2()
    for name, r in zip("ab", ranks, strict=True):
        adapted(model, r=r, alpha=3, adapter=name, values=r + ord(name))
        lora.save(model, folder / name, adapter=name)
    theirs = peft.PeftModel.from_pretrained(twin(tiny_gpt2()), folder / "a", "a")
    theirs.load_adapter(folder / "b", "b")
    theirs.add_weighted_adapter(["a", "b"], list(scale), "both", combination_type="cat")
    theirs.set_adapter("both")
    parts = [algebra.scale(algebra.read(folder / n), w) for n, w in zip("ab", scale, strict=True)]
    both = algebra.add(*parts)
    plain = tiny_gpt2()
    algebra.implant(plain, both)
    torch.testing.assert_close(plain(IDX), theirs.eval()(IDX).logits, rtol=1e-4, atol=1e-4)


def test_pefts_folders_of_several_adapters_load(tmp_path):
    theirs = peft_model(tiny_gpt2()).eval()
    torch.manual_seed(1)
    other = peft.LoraConfig(
        r=2, target_modules=["c_fc"], fan_in_fan_out=True, init_lora_weights=False
    )
    theirs.add_adapter("poet", other)
    theirs.save_pretrained(tmp_path)
    model = tiny_gpt2()
    lora.load(model, tmp_path)
    lora.load(model, tmp_path / "poet", adapter="poet")
    for name in ("default", "poet"):
        theirs.set_adapter(name)
        lora.activate(model, name)
        torch.testing.assert_close(model(IDX), theirs(IDX).logits, rtol=1e-5, atol=1e-5)
