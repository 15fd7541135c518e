"""Who reads an adapted layer's weight computes the adapted layer; messages that say what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora
from tests.toys import layer, randomize, raw, tiny_gpt2


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_weight_in_force_has_the_gradients_of_the_forward_pass(kind):
    torch.manual_seed(0)
    model = nn.Sequential(layer(kind, 4, 5).double())
    lora.inject(model, targets="0", r=2)
    randomize(model)
    adapted, x = model[0], torch.randn(3, 4).double()
    assert adapted.bias is adapted.base.bias
    adapted(x).square().sum().backward()
    want = [p.grad.clone() for p in adapted.updates.parameters()]
    model.zero_grad()
    weight = adapted.weight if kind == "conv1d" else adapted.weight.t()
    y = x @ weight + adapted.bias
    torch.testing.assert_close(y, adapted(x))
    y.square().sum().backward()
    for p, grad in zip(adapted.updates.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_the_weight_in_force_follows_the_state():
    model = nn.Sequential(nn.Linear(4, 5))
    lora.inject(model, targets="0", r=2, adapter="a")
    randomize(model, "a")
    adapted = model[0]
    ideal = adapted.weight.detach().clone()
    assert not torch.allclose(ideal, adapted.base.weight)
    with lora.disabled(model):
        assert adapted.weight is adapted.base.weight
    with lora.activated(model, {}):
        assert adapted.weight is adapted.base.weight
    with lora.merged(model):
        torch.testing.assert_close(adapted.weight, ideal)
        with lora.disabled(model):
            assert adapted.weight is adapted.base.weight
    with lora.routed(model, ["a"]), pytest.raises(RuntimeError, match="no one weight"):
        adapted.weight  # noqa: B018


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
        y = model(x)
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
    lora.inject(model, r=2, alpha=3, targets=("q", "v", "wo", "wi_0"))
    randomize(model)
    lora.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True).eval()
    ids = torch.randint(1, 40, (2, 7))
    grads = []
    for each in (model, theirs):
        y = each(input_ids=ids, labels=ids)
        y.loss.backward()
        grads.append((y.logits, [p.grad for p in each.parameters() if p.requires_grad]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merged", [False, True])
def test_save_pretrained_of_an_adapted_model_is_the_bases(merged, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).eval()
    want = {key: raw(value) for key, value in model.state_dict().items()}
    ids = torch.tensor([[1, 2, 3]])
    base = model(ids).logits
    lora.inject(model, r=2, targets=("c_attn", "mlp.c_fc"))
    randomize(model)
    if merged:
        lora.merge(model)
    model.save_pretrained(tmp_path)
    again, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert {key: raw(value) for key, value in again.state_dict().items()} == want
    assert torch.equal(again.eval()(ids).logits, base)


def test_a_state_dict_goes_round_and_a_plain_model_takes_the_bases_part():
    model, plain = tiny_gpt2(), tiny_gpt2(seed=3)
    lora.inject(model, r=2)
    randomize(model)
    lora.merge(model)
    twin = tiny_gpt2(seed=4)
    lora.inject(twin, r=2)
    twin.load_state_dict(model.state_dict())
    lora.unmerge(model)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(twin(ids), model(ids))
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all(".updates." in key for key in unexpected)
    plain.load_state_dict(lora.base_state_dict(model))
    with lora.disabled(model):
        assert torch.equal(plain(ids), model(ids))


# Messages that say what to do
