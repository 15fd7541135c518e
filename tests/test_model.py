from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from gpt2 import GPT2, GenerateConfig, GPT2Config, generate
from gpt2.cache import KVCache
from tests import reference
from tests.toys import twin

DEMO = Path(__file__).parent.parent / "gpt2" / "assets" / "demo"
DRY = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
TINY = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 16, "vocab_size": 50}


def tiny(**changes) -> GPT2:
    torch.manual_seed(0)
    model = GPT2(GPT2Config(**{**TINY, **DRY, **changes}))
    for p in model.parameters():  # biases and LayerNorms too, or their mistakes would not show
        p.data.add_(torch.randn_like(p), alpha=0.3)
    return model.double().eval()


def weights_of(model: GPT2) -> dict:
    return {
        name.removeprefix("transformer."): p.detach().double().numpy()
        for name, p in model.named_parameters()
    }


@torch.no_grad()
def test_float64_logits_are_the_oracles(demo, tokenizer):
    ids = tokenizer.encode("In the beginning God created the heaven and the earth.\n\nAnd")
    logits = deepcopy(demo).double()(torch.tensor([ids]))[0]
    expected = torch.from_numpy(reference.forward(weights_of(demo), ids, n_head=4))
    # Both round at 1e-16, on logits of up to 16 or so.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)


@torch.no_grad()
def test_float32_logits_loss_and_greedy_are_the_oracles(demo, tokenizer):
    ids = tokenizer.encode("The capital of France is")
    weights = weights_of(demo)
    logits = demo(torch.tensor([ids]))[0]
    expected = torch.from_numpy(reference.forward(weights, ids, n_head=4))
    # float32 rounds at 6e-8; eight blocks of sums over 256 to 1,024 terms leave some 1e-6 of it.
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=5e-5)
    mean_loss = F.cross_entropy(logits[:-1], torch.tensor(ids[1:])).item()
    assert mean_loss == pytest.approx(reference.loss(weights, ids, n_head=4), abs=1e-5)
    [text] = generate(demo, [ids], GenerateConfig(max_new_tokens=8))
    assert text == reference.greedy(weights, ids, 8, n_head=4)


@torch.no_grad()
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_config_reaches_the_arithmetic(eps):
    model = tiny(layer_norm_epsilon=eps)
    ids = [1, 2, 3, 4, 49]
    expected = reference.forward(weights_of(model), ids, n_head=3, eps=eps)
    torch.testing.assert_close(
        model(torch.tensor([ids]))[0], torch.from_numpy(expected), rtol=1e-10, atol=1e-10
    )


@torch.no_grad()
def test_transformers_agrees_on_the_demo_base_in_both_layouts(demo, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(DEMO, dtype=torch.float32)
    theirs.save_pretrained(tmp_path)  # with the `transformer.` prefix
    idx = torch.randint(50257, (2, 64), generator=torch.Generator().manual_seed(0))
    ours = demo(idx)
    truth = deepcopy(demo).double()(idx)
    errors = [x.double() - truth for x in (ours, theirs.eval()(idx).logits)]
    mine, others = (float(error.square().mean().sqrt()) for error in errors)
    assert mine < 1.1 * others < 1e-5  # both round at each step, in orders of their own
    assert float(errors[0].abs().max()) < 2e-4
    torch.testing.assert_close(ours, GPT2.from_pretrained(str(tmp_path))(idx), rtol=0, atol=0)


@torch.no_grad()
def test_transformers_agrees_at_the_124m_shape():
    torch.manual_seed(0)
    model = GPT2(GPT2Config()).eval()
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    idx = torch.randint(50257, (1, 24))
    torch.testing.assert_close(model(idx), twin(model)(idx).logits, rtol=1e-5, atol=1e-5)


def test_gradients_are_transformers_own():
    model = tiny().train()
    theirs = twin(model).train()
    idx = torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(1))
    for logits in (model(idx), theirs(idx).logits):  # their own loss rounds to float32
        F.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten()).backward()
    expected = dict(theirs.named_parameters())
    assert dict(model.named_parameters()).keys() == expected.keys()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-8, atol=1e-12, msg=name)


@torch.no_grad()
def test_the_cache_changes_nothing():
    model = tiny()
    idx = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(2))
    whole = model(idx)
    for cuts in ([12], [1] * 12, [5, 1, 1, 5]):
        cache = KVCache(model.config, 2, 16, torch.float64, torch.device("cpu"))
        pieces = [model(piece, cache=cache) for piece in idx.split(cuts, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_rows_of_different_lengths_are_each_as_alone():
    model = tiny()
    rows = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5]]
    then = [8, 9, 7]
    cache = KVCache(model.config, 3, 16, torch.float64, torch.device("cpu"))
    model(torch.tensor([row + [0] * (7 - len(row)) for row in rows]), cache=cache)
    cache.lengths = torch.tensor([len(row) for row in rows])
    together = model(torch.tensor(then)[:, None], cache=cache)[:, -1]
    for i, row in enumerate(rows):
        alone = model(torch.tensor([[*row, then[i]]]))[0, -1]
        torch.testing.assert_close(together[i], alone, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_position_sees_a_later_one(dropout):
    model = tiny(attn_pdrop=dropout).train()

    def logits(idx: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return model(idx)

    a = torch.randint(50, (1, 16), generator=torch.Generator().manual_seed(3))
    b = a.clone()
    b[0, 10:] = (b[0, 10:] + 1) % 50
    torch.testing.assert_close(logits(a)[:, :10], logits(b)[:, :10], rtol=0, atol=1e-12)
    assert not torch.allclose(logits(a)[:, 10:], logits(b)[:, 10:])


@pytest.mark.parametrize("site", DRY)
def test_each_dropout_is_on_in_training_and_off_in_eval(site):
    model = tiny(**{site: 0.5})
    idx = torch.arange(12)[None]
    still = model(idx)
    assert torch.equal(model(idx), still)
    torch.testing.assert_close(still, tiny()(idx))
    model.train()
    torch.manual_seed(0)
    first = model(idx)
    assert not torch.allclose(first, still)
    assert not torch.allclose(model(idx), first)


def test_residual_dropout_is_after_attention_and_after_the_mlp():
    model = tiny(resid_pdrop=0.5, n_layer=1).train()
    seen = []
    for name in ("attn", "mlp"):
        getattr(model.transformer.h[0], name).register_forward_hook(
            lambda module, args, output: seen.append((output == 0).double().mean().item())
        )
    model(torch.randint(50, (8, 16)))
    assert seen == pytest.approx([0.5, 0.5], abs=0.1)


@pytest.mark.parametrize(
    ("idx", "message"),
    [
        (torch.zeros(1, 17, dtype=torch.long), "17 tokens do not fit.* 1 to 16"),
        (torch.zeros(1, 0, dtype=torch.long), "0 tokens do not fit"),
        (torch.zeros(3, dtype=torch.long), r"expected 2, got 1"),
    ],
)
def test_bad_idx(idx, message):
    with pytest.raises(ValueError, match=message):
        tiny()(idx)
    with pytest.raises(ValueError, match=r"labels \(3, 2\) and token ids \(2, 3\) differ"):
        tiny()(torch.zeros(2, 3, dtype=torch.long), torch.zeros(3, 2, dtype=torch.long))


@torch.no_grad()
def test_a_full_cache_refuses_more():
    model = tiny()
    cache = KVCache(model.config, 1, 4, torch.float64, torch.device("cpu"))
    model(torch.zeros(1, 4, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="5 tokens do not fit"):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


def test_a_bad_config_lists_all_its_faults():
    with pytest.raises(ValueError, match=r"n_layer.*0.*vocab_size.*'x'.*attn_pdrop.*1\.0"):
        GPT2Config(n_layer=0, vocab_size="x", attn_pdrop=1.0)


def test_a_new_model_is_drawn_as_for_pretraining():
    torch.manual_seed(0)
    model = GPT2(GPT2Config(**{**TINY, "n_layer": 8, "n_embd": 96}))
    block = model.transformer.h[0]
    assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))
    assert (block.ln_1.weight == 1).all()
    assert model.lm_head.weight is model.transformer.wte.weight
