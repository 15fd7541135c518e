"""Merging: exact, refused where it would lie, undone to the byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora
from tests.toys import IDX, dense, layer, randomize, raw, snapshot, tiny_gpt2, untie

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ALL = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def one_layer(kind: str, n_in: int, n_out: int, r: int, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(n_in * 31 + n_out * 7 + r)
    model = nn.Sequential(layer(kind, n_in, n_out, dtype))
    lora.inject(model, r=r, alpha=5, targets="0", seed=1)
    randomize(model)
    return model


def adapted_gpt2(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny_gpt2(dtype=dtype)
    lora.inject(model, r=4, targets=ALL, seed=0)
    randomize(model)
    return model


shapes = st.tuples(st.sampled_from(["linear", "conv1d"]), st.integers(1, 12), st.integers(1, 12))


@given(shapes, st.sampled_from(DTYPES))
def test_a_merged_weight_is_the_float64_ideal_rounded_once(shape, dtype):
    model = one_layer(*shape, 1, dtype)
    update = model[0].updates["default"]
    ideal = dense(model[0].base).double() + 5.0 * update.B.double() @ update.A.double()
    lora.merge(model)
    merged = model[0].weight if shape[0] == "linear" else model[0].weight.t()
    assert merged.dtype == dtype
    assert torch.equal(merged, ideal.detach().to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_is_about_as_near_the_truth_as_unmerged_in_16_bits(dtype):
    model = adapted_gpt2(dtype)
    truth = tiny_gpt2()
    truth.load_state_dict({k: v.float() for k, v in lora.base_state_dict(model).items()})
    lora.inject(truth, r=4, targets=ALL)
    randomize(truth)
    want = truth(IDX)
    unmerged = (model(IDX).float() - want).norm()
    with lora.merged(model):
        merged = (model(IDX).float() - want).norm()
    assert merged <= 1.5 * unmerged


@settings(max_examples=30)
@given(st.sampled_from(DTYPES), st.lists(st.sampled_from("mudxs"), max_size=8))
def test_bytes_come_back_after_any_sequence(dtype, steps):
    """m merge, u unmerge, d disabled, x merged(), s other values in A and B."""
    model = adapted_gpt2(dtype)
    base = {k: raw(v) for k, v in lora.base_state_dict(model).items()}
    reference = raw(tiny_gpt2(dtype=dtype)(IDX))
    for n, step in enumerate(steps):
        merged = lora.is_merged(model)
        if step == "m" and not merged:
            lora.merge(model)
        elif step == "u" and merged:
            lora.unmerge(model)
        elif step == "d":
            with lora.disabled(model):
                assert raw(model(IDX)) == reference
        elif step == "x":
            with lora.merged(model):
                model(IDX)
        elif step == "s" and not merged:
            randomize(model, seed=n)
        assert {k: raw(v) for k, v in lora.base_state_dict(model).items()} == base
    if lora.is_merged(model):
        lora.unmerge(model)
    lora.eject(model)
    assert raw(model(IDX)) == reference


def test_a_merged_model_multiplies_by_no_factor(monkeypatch):
    model = adapted_gpt2()
    lora.merge(model)
    monkeypatch.setattr(lora.LowRankUpdate, "forward", lambda *_: pytest.fail("extra matmul"))
    model(IDX)


def test_a_merged_model_that_is_cast_takes_its_merged_weights_along():
    model = adapted_gpt2()
    lora.merge(model)
    want = model(IDX).double()
    torch.testing.assert_close(model.double()(IDX), want, rtol=1e-3, atol=1e-3)


def test_the_contexts_nest_survive_exceptions_and_restore_what_was():
    model = adapted_gpt2()
    base = raw(tiny_gpt2()(IDX))
    with lora.disabled(model):
        with lora.disabled(model):
            assert raw(model(IDX)) == base
        assert raw(model(IDX)) == base  # the inner one restored the outer's state
        with lora.merged(model):
            assert raw(model(IDX)) == base  # disabled means the base, merged or not
    assert raw(model(IDX)) != base
    with pytest.raises(KeyError), lora.merged(model):
        assert lora.is_merged(model)
        with lora.merged(model):
            pass
        assert lora.is_merged(model)
        raise KeyError
    assert not lora.is_merged(model)
    with pytest.raises(KeyError), lora.disabled(model):
        raise KeyError
    assert raw(model(IDX)) != base
    lora.merge(model)
    with lora.merged(model):
        lora.unmerge(model)
    assert lora.is_merged(model)


def test_states_that_refuse():
    model = adapted_gpt2()
    with pytest.raises(RuntimeError, match="not merged"):
        lora.unmerge(model)
    lora.merge(model)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="is merged"):
        lora.merge(model)
    with pytest.raises(RuntimeError, match=r"is merged.*merge=True"):
        lora.eject(model)
    assert snapshot(model) == before


def test_merging_in_training_mode_with_dropout_is_refused():
    model = tiny_gpt2()
    lora.inject(model, r=2, dropout=0.1)
    lora.merge(model)  # eval mode
    lora.unmerge(model)
    model.train()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"h.0.attn.c_attn trains with dropout. Call model.eval"):
        lora.merge(model)
    assert snapshot(model) == before


def test_merging_a_shared_weight_is_refused_and_names_both():
    model = tiny_gpt2()
    untie(model.lm_head)
    lora.inject(model, r=2, targets=("c_attn", "lm_head"))
    lora.merge(model)
    lora.unmerge(model)
    layer = model.lm_head
    layer.base.weight = model.transformer.wte.weight  # tied again behind our back
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"transformer.wte.weight and lm_head.weight are one"):
        lora.merge(model)
    with pytest.raises(ValueError, match="are one tensor"):
        lora.eject(model, merge=True)
    assert snapshot(model) == before


@pytest.mark.parametrize("where", ["A", "B", "base"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_are_refused_at_merge(where, value):
    model = adapted_gpt2()
    target = model.transformer.h[1].mlp.c_fc
    tensor = target.base.weight if where == "base" else getattr(target.updates["default"], where)
    with torch.no_grad():
        tensor[1, 1] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"transformer.h.1.mlp.c_fc.*has NaN or infinite values"):
        lora.merge(model)
    assert snapshot(model) == before


def test_a_merged_weight_that_overflows_its_dtype_is_refused():
    model = one_layer("linear", 4, 4, 2, torch.float16)
    with torch.no_grad():
        model[0].updates["default"].B.fill_(1e5)
    with pytest.raises(ValueError, match="has NaN or infinite values"):
        lora.merge(model)
    assert not lora.is_merged(model)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_layer_without_an_active_update_merges_to_a_weight_that_is_not_the_bases(kind):
    """In float64 nothing is rounded, and yet the merged weight is not the base's memory."""
    model = one_layer(kind, 4, 4, 2, torch.float64)
    lora.activate(model, {})
    want = model(torch.eye(4, dtype=torch.float64))
    for _ in range(2):
        with lora.merged(model):
            assert model[0].weight.data_ptr() != model[0].base.weight.data_ptr()
            assert torch.equal(model(torch.eye(4, dtype=torch.float64)), want)


def test_merging_computes_each_weight_once(monkeypatch):
    model, computed = tiny_gpt2(), []
    lora.inject(model, r=2, targets=("c_attn", "c_fc"))
    randomize(model)
    ideal = lora.LoRALinear.ideal
    monkeypatch.setattr(
        lora.LoRALinear, "ideal", lambda layer: computed.append(layer) or ideal(layer)
    )
    lora.merge(model)
    assert len(computed) == len(set(computed)) == 4
