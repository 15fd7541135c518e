"""Merging: exact, refused where it would lie, undone to the byte; and reading a layer's weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import lora
from tests.toys import IDX, adapted, dense, layer, randomize, raw, refused, tiny_gpt2, untie

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ALL = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
EYE = torch.eye(4, dtype=torch.float64)


def one_layer(kind: str, n_in: int, n_out: int, r: int, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(n_in * 31 + n_out * 7 + r)
    return adapted(nn.Sequential(layer(kind, n_in, n_out, dtype)), r=r, alpha=5, targets="0")


def adapted_gpt2(dtype: torch.dtype = torch.float32) -> nn.Module:
    return adapted(tiny_gpt2(dtype=dtype), r=4, targets=ALL)


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


def test_merging_in_training_mode_with_dropout_is_refused():
    model = adapted(dropout=0.1)
    lora.merge(model)  # eval mode
    lora.unmerge(model)
    model.train()
    words = r"h.0.attn.c_attn trains with dropout. Call model.eval"
    with refused(model, words, RuntimeError):
        lora.merge(model)


def test_merging_a_shared_weight_is_refused_and_names_both():
    model = tiny_gpt2()
    untie(model.lm_head)
    lora.inject(model, r=2, targets=("c_attn", "lm_head"))
    lora.merge(model)
    lora.unmerge(model)
    model.lm_head.base.weight = model.transformer.wte.weight  # tied again behind our back
    for call in (lora.merge, lambda model: lora.eject(model, merge=True)):
        with refused(model, r"transformer.wte.weight and lm_head.weight are one tensor"):
            call(model)


@pytest.mark.parametrize("where", ["A", "B", "base", "sum"])
def test_a_merged_weight_that_is_not_finite_is_refused(where):
    model = adapted_gpt2(torch.float16)
    target = model.transformer.h[1].mlp.c_fc
    update = target.updates["default"]
    with torch.no_grad():
        if where == "sum":
            update.B.fill_(1e5)  # finite, but not in the base's dtype
        else:
            factor = target.base.weight if where == "base" else getattr(update, where)
            factor[1, 1] = torch.inf
    with refused(model, r"transformer.h.1.mlp.c_fc.*has NaN or infinite values"):
        lora.merge(model)
    assert not lora.is_merged(model)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_layer_without_an_active_update_merges_to_a_weight_that_is_not_the_bases(kind):
    """In float64 nothing is rounded, and yet the merged weight is not the base's memory."""
    model = one_layer(kind, 4, 4, 2, torch.float64)
    lora.activate(model, {})
    want = model(EYE)
    for _ in range(2):
        with lora.merged(model):
            assert model[0].weight.data_ptr() != model[0].base.weight.data_ptr()
            assert torch.equal(model(EYE), want)


def test_merging_computes_each_weight_once(monkeypatch):
    model, computed = adapted(targets=("c_attn", "c_fc")), []
    ideal = lora.LoRALinear.ideal
    monkeypatch.setattr(
        lora.LoRALinear, "ideal", lambda layer: computed.append(layer) or ideal(layer)
    )
    lora.merge(model)
    assert len(computed) == len(set(computed)) == 4


# Who reads an adapted layer's weight computes the adapted layer


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_weight_in_force_has_the_gradients_of_the_forward_pass(kind):
    model = one_layer(kind, 4, 5, 2, torch.float64)
    changed, x = model[0], torch.randn(3, 4).double()
    assert changed.bias is changed.base.bias
    changed(x).square().sum().backward()
    want = [p.grad.clone() for p in changed.updates.parameters()]
    model.zero_grad()
    weight = changed.weight if kind == "conv1d" else changed.weight.t()
    y = x @ weight + changed.bias
    torch.testing.assert_close(y, changed(x))
    y.square().sum().backward()
    for p, grad in zip(changed.updates.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_the_weight_in_force_follows_the_state_and_a_write_to_data():
    model = one_layer("linear", 4, 5, 2, torch.float32)
    changed, x = model[0], torch.randn(3, 4)
    before = changed.weight.detach().clone()
    changed.updates["default"].B.data.mul_(2)
    ideal = changed.weight.detach().clone()
    assert not torch.allclose(ideal, before)
    torch.testing.assert_close(F.linear(x, ideal, changed.bias), changed(x))
    with lora.disabled(model):
        assert changed.weight is changed.base.weight
    with lora.activated(model, {}):
        assert changed.weight is changed.base.weight
    with lora.merged(model):
        torch.testing.assert_close(changed.weight, ideal)
        with lora.disabled(model):
            assert changed.weight is changed.base.weight
    with lora.routed(model, ["default"]), pytest.raises(RuntimeError, match="no one weight"):
        changed.weight  # noqa: B018


@pytest.mark.parametrize("state", ["unmerged", "merged", "disabled"])
def test_torchs_encoder_layer_reads_the_weight_in_force_in_eval_mode(state):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        base = model(x)
        lora.inject(model, targets=("linear1", "linear2"), r=2)
        torch.testing.assert_close(model(x), base)
        randomize(model)
        delta = {n: getattr(model, n).updates["default"].delta() for n in ("linear1", "linear2")}
        if state == "merged":
            lora.merge(model)
        y = model(x)
        if state == "disabled":
            with lora.disabled(model):
                assert torch.equal(model(x), base)
            return
        lora.eject(model, merge=state == "merged")
        if state == "unmerged":
            for name, change in delta.items():
                getattr(model, name).weight += change.float()
        torch.testing.assert_close(y, model(x))
    assert not torch.allclose(y, base)


def test_t5_whose_code_reads_a_weights_dtype_is_pefts(tmp_path):
    """Its gated feed-forward reads `wo.weight` twice in a call."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    theirs.load_state_dict(model.state_dict())
    adapted(model, alpha=3, targets=("q", "v", "wo", "wi_0"))
    lora.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True).eval()
    ids = torch.randint(1, 40, (2, 7))
    grads = []
    for each in (model, theirs):
        y = each(input_ids=ids, labels=ids)
        y.loss.backward()
        grads.append((y.logits, [p.grad for p in each.parameters() if p.requires_grad]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_a_state_dict_goes_round_and_a_plain_model_takes_the_bases_part():
    model, other, plain = adapted(), adapted(tiny_gpt2(seed=4)), tiny_gpt2(seed=3)
    lora.merge(model)
    other.load_state_dict(model.state_dict())
    lora.unmerge(model)
    assert torch.equal(other(IDX), model(IDX))
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all(".updates." in key for key in unexpected)
    plain.load_state_dict(lora.base_state_dict(model))
    with lora.disabled(model):
        assert torch.equal(plain(IDX), model(IDX))
