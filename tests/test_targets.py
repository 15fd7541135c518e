"""What an adapter is put on: slices, blocks, exclusions, patterns, embeddings, tied weights."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import gpt2
import lora
from tests.folders import UNSLOTH, edit, refuses, theirs_of
from tests.toys import IDX, MLP, deltas, layer, randomize, raw, snapshot, tiny_gpt2, untie

H = "transformer.h"
LINEAR = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def injected(**arguments) -> gpt2.GPT2:
    model = tiny_gpt2()
    lora.inject(model, **{"r": 2, "alpha": 3, "seed": 0} | arguments)
    randomize(model)
    return model


def in_peft(folder) -> torch.Tensor:
    theirs = peft.PeftModel.from_pretrained(theirs_of(tiny_gpt2()), folder).eval()
    return theirs(IDX).logits


# Slices


@pytest.mark.parametrize("rslora", [False, True])
def test_a_sliced_update_is_one_update_for_each_slice(rslora):
    torch.manual_seed(0)
    model = nn.Sequential(layer("conv1d", 5, 9, torch.float64))
    lora.inject(model, r=2, alpha=3, rslora=rslora, targets="0[q,v]", slices=("q", "k", "v"))
    randomize(model)
    update = model[0].updates["default"]
    a, b = update.A.detach(), update.B.detach()
    assert (a.shape, b.shape) == ((4, 5), (6, 2))
    x = torch.randn(3, 5, dtype=torch.float64)
    s = 3 / (math.sqrt(2) if rslora else 2)
    want = model[0].base(x)
    want[:, 0:3] += s * x @ a[:2].T @ b[:3].T
    want[:, 6:9] += s * x @ a[2:].T @ b[3:].T
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
    with lora.merged(model):
        torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(model(x)[:, 3:6], model[0].base(x)[:, 3:6])  # k is the base's, bit for bit


def test_slices_train_only_their_blocks():
    model = injected(targets="c_attn[q,v]")
    whole = injected(targets="c_attn")
    count = lora.count_parameters(model).trainable
    assert count == 2 * (2 * 2 * 16 + 2 * 16 * 2)
    assert count < 2 * lora.count_parameters(whole).trainable
    optimizer = torch.optim.SGD(lora.trainable_parameters(model), lr=0.1)
    model(IDX).square().mean().backward()
    optimizer.step()
    delta = deltas(lora.algebra.factors(model))[f"{H}.0.attn.c_attn"]
    assert not delta[16:32].any()
    assert delta[:16].any()
    assert delta[32:].any()


@pytest.mark.parametrize("rslora", [False, True])
def test_slices_go_to_peft_and_come_back_as_slices(tmp_path, rslora):
    model = injected(targets="c_attn[q,v]", rslora=rslora)
    want = model(IDX)
    lora.save(model, tmp_path)
    torch.testing.assert_close(in_peft(tmp_path), want, **CLOSE)
    again = tiny_gpt2()
    lora.load(again, tmp_path)
    assert torch.equal(again(IDX), want)
    assert lora.adapters(again) == lora.adapters(model)
    assert lora.count_parameters(again) == lora.count_parameters(model)
    edit(tmp_path, lambda tensors: None, metadata={"format": "pt"})
    plain = tiny_gpt2()  # without our metadata it is a plain adapter of twice the rank
    lora.load(plain, tmp_path)
    torch.testing.assert_close(plain(IDX), want, **CLOSE)
    assert lora.count_parameters(plain).trainable > lora.count_parameters(model).trainable


def test_values_outside_the_slices_are_refused(tmp_path):
    lora.save(injected(targets="c_attn[q,v]"), tmp_path)

    def spoil(tensors):
        tensors[f"base_model.model.{H}.0.attn.c_attn.lora_B.weight"][20, 0] = 1.0

    edit(tmp_path, spoil)
    refuses(tiny_gpt2(), tmp_path, r"h.0.attn.c_attn: B has values outside the slices q, v")


# Which layers


def paths(**arguments) -> set[str]:
    return set(lora.inject(tiny_gpt2(), r=2, **arguments))


EVERY = {f"{H}.{i}.{name}" for i in (0, 1) for name in LINEAR}


def test_all_linear_leaves_the_head_and_the_embeddings():
    assert paths(targets="all-linear") == EVERY
    llama_like = nn.ModuleDict({"emb": nn.Embedding(9, 4), "up": nn.Linear(4, 4)})
    llama_like["out"] = nn.Linear(4, 9, bias=False)
    llama_like["out"].weight = llama_like["emb"].weight
    assert lora.inject(llama_like, r=1, targets="all-linear") == ["up"]


def test_all_linear_leaves_a_head_with_a_weight_of_its_own():
    """Known by its name, or because the model says which it is."""
    model = tiny_gpt2()
    untie(model.lm_head)
    assert set(lora.inject(model, r=2, targets="all-linear")) == EVERY
    other = nn.ModuleDict({"up": nn.Linear(4, 4), "out": nn.Linear(4, 9)})
    other.get_output_embeddings = lambda: other["out"]
    assert lora.inject(other, r=1, targets="all-linear") == ["up"]


@pytest.mark.parametrize("target", ["fc", "ttn.c_attn", r"h\.\d\.attn\.c_attn"])
def test_a_part_of_a_segment_and_a_part_of_a_path_are_no_target(target):
    """A suffix fits whole segments, a regular expression the whole path."""
    with pytest.raises(ValueError, match="No module matches target"):
        lora.inject(tiny_gpt2(), r=2, targets=target)


def test_the_first_number_of_a_path_is_its_block():
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
    model = nn.ModuleDict({"h": blocks})
    assert lora.inject(model, r=2, targets="all-linear", layers=1) == ["h.1.0", "h.1.1"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"targets": "all-linear", "exclude": "c_proj"}, {p for p in EVERY if "c_proj" not in p}),
        ({"targets": "all-linear", "exclude": ("attn.c_proj", "c_fc")},
         {p for p in EVERY if not p.endswith(("attn.c_proj", "c_fc"))}),
        ({"targets": "all-linear", "layers": [1]}, {p for p in EVERY if ".1." in p}),
        ({"targets": "c_attn", "layers": range(1)}, {f"{H}.0.attn.c_attn"}),
        ({"targets": {"c_attn", "c_fc"}, "layers": (i for i in (0,))},
         {f"{H}.0.attn.c_attn", f"{H}.0.mlp.c_fc"}),
        ({"targets": (t for t in ["c_attn[q]"])}, {f"{H}.{i}.attn.c_attn" for i in (0, 1)}),
        ({"targets": "h.1.mlp.c_fc"}, {f"{H}.1.mlp.c_fc"}),
        ({"targets": "wpe"}, {"transformer.wpe"}),
    ],
)  # fmt: skip
def test_targets_reach(arguments, expected):
    assert paths(**arguments) == expected


def test_patterns_give_each_target_its_own_rank_and_alpha(tmp_path):
    model = injected(
        targets="all-linear",
        rank_pattern={"h.1.mlp.c_fc": 7, "c_fc": 5, "attn.c_proj": 1},
        alpha_pattern={"c_attn": 9, "h.0.mlp.c_proj": 0.5},
    )
    configs = lora.adapters(model)["default"]
    assert {p: (c.r, c.alpha) for p, c in configs.items()} == {
        f"{H}.{i}.{name}": (
            {"mlp.c_fc": (5, 7)[i], "attn.c_proj": 1}.get(name, 2),
            9 if name == "attn.c_attn" else 0.5 if (i, name) == (0, "mlp.c_proj") else 3,
        )
        for i in (0, 1)
        for name in LINEAR
    }
    want = model(IDX)
    lora.save(model, tmp_path)
    torch.testing.assert_close(in_peft(tmp_path), want, **CLOSE)
    again = tiny_gpt2()
    lora.load(again, tmp_path)
    assert torch.equal(again(IDX), want)
    assert lora.adapters(again) == lora.adapters(model)


def test_a_path_that_ends_another_is_saved_so_that_it_matches_alone(tmp_path):
    """`up` at the root is also the end of `block.up`: in a list it would match both."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        root = MLP()
        root.block = MLP()
        root.block.block = MLP()
        return root.eval()

    for case, arguments in {
        "fewer": {"exclude": "block.up"},
        "ranks": {
            "rank_pattern": {"block.block.up": 3, "block.up": 2},
            "alpha_pattern": {"block.up": 5},
        },
    }.items():
        ours = model()
        lora.inject(ours, r=1, targets="up", **arguments)
        randomize(ours)
        lora.save(ours, tmp_path / case)
        again = model()
        lora.load(again, tmp_path / case)
        assert lora.adapters(again) == lora.adapters(ours)
        theirs = peft.PeftModel.from_pretrained(model(), tmp_path / case)
        for path, config in lora.adapters(ours)["default"].items():
            other = theirs.base_model.model.get_submodule(path)
            assert other.r["default"] == config.r
            assert other.lora_alpha["default"] == config.alpha
        wrapped = {n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
        assert wrapped == set(lora.adapters(ours)["default"])


# Embeddings and tied weights


def test_an_embedding_starts_as_the_base_and_follows_the_formula():
    model = tiny_gpt2(dtype=torch.float64)
    want = raw(model(IDX))
    untie(model.transformer.wte)
    lora.inject(model, r=3, alpha=2, targets=("wte", "wpe"), seed=0)
    assert raw(model(IDX)) == want
    wte = model.transformer.wte
    update = wte.updates["default"]
    assert not update.A.any()
    assert update.B.std().item() == pytest.approx(1, abs=0.3)
    randomize(model)
    expected = wte.base.weight + 2 / 3 * (update.B @ update.A).t()
    torch.testing.assert_close(wte(IDX), expected[IDX], rtol=1e-12, atol=1e-12)
    with lora.merged(model):
        torch.testing.assert_close(wte(IDX), expected[IDX], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("routed", [False, True])
def test_the_row_of_padding_is_not_trained(routed):
    model = nn.Sequential(nn.Embedding(4, 3, padding_idx=1))
    lora.inject(model, r=2, targets="0")
    with lora.routed(model, ["default"] * 2) if routed else nullcontext():
        model(torch.tensor([[0, 1], [1, 3]])).sum().backward()
    grad = model[0].updates["default"].A.grad  # (r, ids)
    assert grad.any(0).tolist() == [True, False, False, True]


def test_embeddings_go_to_peft_and_come_back(tmp_path):
    model = injected(targets=("wpe", "c_attn"))
    want = model(IDX)
    lora.save(model, tmp_path / "ours")
    torch.testing.assert_close(in_peft(tmp_path / "ours"), want, **CLOSE)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["wpe", "c_fc"],
        fan_in_fan_out=True,
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(theirs_of(tiny_gpt2()), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    again = tiny_gpt2()
    lora.load(again, tmp_path / "theirs")
    torch.testing.assert_close(again(IDX), theirs(IDX).logits, **CLOSE)


def test_a_head_that_was_untied_by_hand_is_adapted_and_folded():
    model = tiny_gpt2()
    base, wte = raw(model(IDX)), raw(model.transformer.wte.weight)
    untie(model.lm_head)
    before = snapshot(model)
    lora.inject(model, r=2, targets=("lm_head", "c_attn"))
    assert raw(model(IDX)) == base
    randomize(model)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".updates." in n for n in trainable)
    with lora.merged(model):
        want = raw(model(IDX))
    lora.eject(model)
    assert snapshot(model) == before
    lora.inject(model, r=2, targets=("lm_head", "c_attn"))
    randomize(model)
    lora.eject(model, merge=True)
    assert raw(model(IDX)) == want
    assert raw(model.transformer.wte.weight) == wte
    assert all(p.requires_grad for p in model.parameters())


# Training


def test_parameter_groups_give_b_its_own_rate():
    model = injected(targets=("c_attn[q,v]", "c_fc"))
    a, b = lora.parameter_groups(model, 1e-3, b_ratio=8)
    assert (a["lr"], b["lr"]) == (1e-3, 8e-3)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)][-1] for p in a["params"]} == {"A"}
    assert {names[id(p)][-1] for p in b["params"]} == {"B"}
    both = [*a["params"], *b["params"]]
    assert {id(p) for p in both} == {id(p) for p in lora.trainable_parameters(model)}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([a, b])
    model(IDX).square().mean().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        if ".updates." in name:
            rate = 8e-3 if name.endswith("B") else 1e-3
            torch.testing.assert_close(p.detach(), before[name] - rate * p.grad)


def test_the_factor_that_starts_at_zero_learns_faster_of_an_embedding_too():
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5))
    lora.inject(model, r=2, targets=("0", "1"), seed=0)
    slow, fast = lora.parameter_groups(model, 1e-3, b_ratio=8)
    embedding, linear = (layer.updates["default"] for layer in model)
    assert not embedding.A.any()
    assert not linear.B.any()
    assert {id(p) for p in fast["params"]} == {id(embedding.A), id(linear.B)}
    assert {id(p) for p in slow["params"]} == {id(embedding.B), id(linear.A)}
    assert (slow["lr"], fast["lr"]) == (1e-3, 8e-3)


@pytest.mark.parametrize(
    "target", [r"transformer\.(h\.\d+\.)+attn.c_attn", rf"(?:{UNSLOTH})|.*attn\.c_attn"]
)
def test_a_regular_expression_that_repeats_is_a_target(target):
    model = tiny_gpt2()
    assert lora.inject(model, targets=target) == [f"{H}.{i}.attn.c_attn" for i in (0, 1)]


@pytest.mark.parametrize(
    ("lr", "ratio"),
    [(0, 16), (-1, 16), (float("nan"), 16), (1e-3, 0), (1e-3, float("inf"))],
)
def test_rates_that_are_refused(lr, ratio):
    with pytest.raises(ValueError, match="lr and b_ratio must be"):
        lora.parameter_groups(injected(), lr, b_ratio=ratio)


# Every argument; what is refused is in test_refusals

VALID = {
    "r": st.integers(1, 5),
    "alpha": st.one_of(st.integers(1, 99), st.floats(0.01, 99)),
    "dropout": st.sampled_from([0, 0.0, 0.5, 0.99]),
    "targets": st.sampled_from(
        [
            "c_attn",
            ("c_attn", "c_fc"),
            "all-linear",
            ["c_attn[q,v]", "mlp.c_proj"],
            {"c_fc", "c_attn"},
        ]
    ),
    "layers": st.sampled_from([None, range(2), [0, 1], {1, 0}]),
    "rank_pattern": st.sampled_from([None, {}, {"h.1.attn.c_attn": 3}, {"attn.c_attn": 1}]),
    "alpha_pattern": st.sampled_from([None, {}, {"h.1.attn.c_attn": 0.5}]),
    "rslora": st.booleans(),
    "adapter": st.sampled_from(["default", "a b", "0", "é", "x/y"]),
    "seed": st.one_of(st.none(), st.integers(-5, 2**40)),
    "dtype": st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16, torch.float64]),
}


@settings(max_examples=40, deadline=None)
@given(st.fixed_dictionaries({}, optional=VALID))
def test_no_valid_config_raises(arguments):
    model = tiny_gpt2()
    want = raw(model(IDX))
    lora.inject(model, **arguments)
    assert raw(model(IDX)) == want
    lora.eject(model)
    assert raw(model(IDX)) == want


def test_all_linear_says_what_it_leaves_out():
    model = nn.Sequential(nn.Linear(4, 4), weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="all-linear leaves out 1: its weight is no 2-D floating"):
        lora.inject(model, r=2, targets="all-linear")
    assert set(lora.adapters(model)["default"]) == {"0", "2"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.inject(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), r=2, targets="all-linear")
