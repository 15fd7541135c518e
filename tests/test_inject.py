"""Injecting and ejecting: what an adapter is put on, of which rank, and what of it is trained."""

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
from tests.folders import UNSLOTH, drop_metadata, edit, in_peft, refuses
from tests.toys import (
    IDX,
    MLP,
    TINY,
    adapted,
    deltas,
    layer,
    randomize,
    raw,
    snapshot,
    tiny_gpt2,
    twin,
    untie,
)

H = "transformer.h"
ALL = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
EVERY = {f"{H}.{i}.{name}" for i in (0, 1) for name in ALL}
C_ATTN = {f"{H}.{i}.attn.c_attn" for i in (0, 1)}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EXACT = {"rtol": 1e-12, "atol": 1e-12}


# Which layers


def test_paths_freezing_and_counts():
    model = gpt2.GPT2(TINY)
    paths = lora.inject(model, r=4)
    assert paths == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{p}.updates.default.{f}" for p in paths for f in "AB"}
    assert len(lora.trainable_parameters(model)) == 4
    count = lora.count_parameters(model)
    assert count.trainable == 2 * (4 * 16 + 48 * 4)
    assert count.total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "attention", "every"),
    [
        ("gpt2", 294_912, 1_179_648),
        ("gpt2-medium", 786_432, 3_145_728),
        ("gpt2-large", 1_474_560, 5_898_240),
        ("gpt2-xl", 2_457_600, 9_830_400),
    ],
)
def test_counts_are_those_of_peft_and_print_alike(name, attention, every):
    for targets, expected in ((("c_attn",), attention), (ALL, every)):
        with torch.device("meta"):
            model = gpt2.GPT2(gpt2.SIZES[name])
        lora.inject(model, targets=targets)
        assert lora.count_parameters(model).trainable == expected
        if expected == 294_912:
            assert str(lora.count_parameters(model)) == (
                "trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.2364"
            )


def test_a_target_is_matched_on_whole_segments():
    """`up` ends `block.up`, and neither `backup` nor `block.backup`."""

    def build() -> nn.Module:
        names = ("up", "backup", "block")
        model = nn.ModuleDict({name: nn.Linear(4, 4) for name in names[:2]})
        model["block"] = nn.ModuleDict({name: nn.Linear(4, 4) for name in names[:2]})
        return model

    for arguments, expected in (
        ({"targets": "up"}, ["up", "block.up"]),
        ({"targets": "block.up"}, ["block.up"]),
        ({"targets": ("up", "backup"), "exclude": "up"}, ["backup", "block.backup"]),
    ):
        assert lora.inject(build(), r=2, **arguments) == expected
    for part in ("u", "ock.up", "lock.backup"):
        with pytest.raises(ValueError, match=f"No module matches target '{part}'"):
            lora.inject(build(), r=2, targets=part)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"targets": "all-linear"}, EVERY),
        ({"targets": "all-linear", "exclude": "c_proj"}, {p for p in EVERY if "c_proj" not in p}),
        ({"targets": "all-linear", "exclude": ("attn.c_proj", "c_fc")},
         {p for p in EVERY if not p.endswith(("attn.c_proj", "c_fc"))}),
        ({"targets": "all-linear", "layers": [1]}, {p for p in EVERY if ".1." in p}),
        ({"targets": "c_attn", "layers": range(1)}, {f"{H}.0.attn.c_attn"}),
        ({"targets": {"c_attn", "c_fc"}, "layers": (i for i in (0,))},
         {f"{H}.0.attn.c_attn", f"{H}.0.mlp.c_fc"}),
        ({"targets": (t for t in ["c_attn[q]"])}, C_ATTN),
        ({"targets": "h.1.mlp.c_fc"}, {f"{H}.1.mlp.c_fc"}),
        ({"targets": "wpe"}, {"transformer.wpe"}),
        ({"targets": r"transformer\.(h\.\d+\.)+attn.c_attn"}, C_ATTN),
        ({"targets": rf"(?:{UNSLOTH})|.*attn\.c_attn"}, C_ATTN),
    ],
)  # fmt: skip
def test_targets_reach(arguments, expected):
    assert set(lora.inject(tiny_gpt2(), r=2, **arguments)) == expected


def test_all_linear_leaves_the_head_however_it_is_known():
    """By its name, because it is tied to an embedding, or because the model says which it is."""
    model = tiny_gpt2()
    untie(model.lm_head)
    assert set(lora.inject(model, r=2, targets="all-linear")) == EVERY
    for sign in ("tied", "said"):
        other = nn.ModuleDict({"emb": nn.Embedding(9, 4), "up": nn.Linear(4, 4)})
        other["out"] = nn.Linear(4, 9, bias=False)
        if sign == "tied":
            other["out"].weight = other["emb"].weight
        else:
            other.get_output_embeddings = lambda other=other: other["out"]
        assert lora.inject(other, r=1, targets="all-linear") == ["up"]


def test_all_linear_says_what_it_leaves_out():
    model = nn.Sequential(nn.Linear(4, 4), weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="all-linear leaves out 1: its weight is no 2-D floating"):
        lora.inject(model, r=2, targets="all-linear")
    assert set(lora.adapters(model)["default"]) == {"0", "2"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.inject(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), r=2, targets="all-linear")


def test_the_first_number_of_a_path_is_its_block():
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
    model = nn.ModuleDict({"h": blocks})
    assert lora.inject(model, r=2, targets="all-linear", layers=1) == ["h.1.0", "h.1.1"]


def test_patterns_give_each_target_its_own_rank_and_alpha(tmp_path):
    model = adapted(
        alpha=3,
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
        for name in ALL
    }
    goes_round(model, tmp_path)


def goes_round(model: nn.Module, folder) -> None:
    """Saved, the adapter computes the same in PEFT, and to the bit in a model of ours."""
    want = model(IDX)
    lora.save(model, folder)
    torch.testing.assert_close(in_peft(folder), want, **CLOSE)
    again = tiny_gpt2()
    lora.load(again, folder)
    assert torch.equal(again(IDX), want)
    assert lora.adapters(again) == lora.adapters(model)
    assert lora.count_parameters(again) == lora.count_parameters(model)


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
        ours = adapted(model(), r=1, targets="up", **arguments)
        lora.save(ours, tmp_path / case)
        again = model()
        lora.load(again, tmp_path / case)
        assert lora.adapters(again) == lora.adapters(ours)
        theirs = peft.PeftModel.from_pretrained(model(), tmp_path / case).base_model.model
        wrapped = {n: m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
        assert {n: (m.r["default"], m.lora_alpha["default"]) for n, m in wrapped.items()} == {
            n: (c.r, c.alpha) for n, c in lora.adapters(ours)["default"].items()
        }


def test_a_module_under_several_paths_is_adapted_once_under_each():
    model = nn.Sequential(MLP(), MLP())
    model[1].up = model[0].up
    assert lora.inject(model, r=2, targets="up") == ["0.up", "1.up"]
    assert model[0].up is model[1].up
    assert isinstance(model[0].up, lora.LoRALinear)
    assert len(lora.trainable_parameters(model)) == 2
    assert set(lora.base_state_dict(model)) == set(nn.Sequential(MLP(), MLP()).state_dict())
    assert lora.eject(model) == ["0.up", "1.up"]
    assert isinstance(model[1].up, nn.Linear)


# How an adapter begins


def test_a_seed_gives_the_same_adapter_whatever_the_order():
    factors = []
    for targets in (ALL, ALL[::-1], "c_attn"):
        model = tiny_gpt2()
        lora.inject(model, r=2, targets=targets, seed=7)
        factors.append({n: raw(p) for n, p in model.named_parameters() if ".updates." in n})
    assert factors[0] == factors[1]
    assert factors[2].items() <= factors[0].items()
    a = [v for n, v in factors[0].items() if n.endswith("c_attn.updates.default.A")]
    assert a[0] != a[1]  # layers differ from each other


def test_a_given_seed_leaves_the_global_generator_alone_and_none_follows_it():
    torch.manual_seed(1)
    lora.inject(tiny_gpt2(), r=2, seed=3)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert after == torch.rand(1)
    drawn = []
    for seed in (1, 1, 2):
        model = tiny_gpt2()
        torch.manual_seed(seed)
        lora.inject(model, r=2)
        drawn.append(raw(lora.trainable_parameters(model)[0]))
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_is_kaiming_uniform_and_b_zero():
    model = nn.Sequential(nn.Linear(400, 300))
    lora.inject(model, r=50, targets="0", seed=0)
    update = model[0].updates["default"]
    assert update.A.abs().max() <= 1 / 20
    assert update.A.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.02)
    assert abs(update.A.mean()) < 1e-3
    assert not update.B.any()


def test_dtype_device_and_mode_follow_the_base_unless_asked():
    for dtype, asked in ((torch.float64, None), (torch.bfloat16, torch.bfloat16)):
        model = tiny_gpt2(dtype=dtype)
        lora.inject(model, r=2, dtype=asked)
        assert {p.dtype for p in lora.trainable_parameters(model)} == {dtype}
    with torch.device("meta"):
        model = gpt2.GPT2(TINY)
    lora.inject(model, r=2)
    assert all(p.is_meta for p in lora.trainable_parameters(model))
    for training in (True, False):
        model = tiny_gpt2().train(training).requires_grad_(False)
        lora.inject(model, r=2, dropout=0.5)
        assert {m.training for m in model.modules()} == {training}
        assert len(lora.trainable_parameters(model)) == 4
        lora.eject(model)
        assert lora.trainable_parameters(model) == []


def test_without_adapters_every_call_says_so():
    for call in (lora.eject, lora.merge, lora.unmerge, lora.is_merged):
        with pytest.raises(RuntimeError, match="carries no adapter"):
            call(tiny_gpt2())
    for context in (lora.disabled, lora.merged):
        with pytest.raises(RuntimeError, match="carries no adapter"), context(tiny_gpt2()):
            pass


# Slices


@pytest.mark.parametrize("rslora", [False, True])
def test_a_sliced_update_is_one_update_for_each_slice(rslora):
    torch.manual_seed(0)
    model = nn.Sequential(layer("conv1d", 5, 9, torch.float64))
    adapted(model, alpha=3, rslora=rslora, targets="0[q,v]", slices=("q", "k", "v"))
    update = model[0].updates["default"]
    a, b = update.A.detach(), update.B.detach()
    assert (a.shape, b.shape) == ((4, 5), (6, 2))
    x = torch.randn(3, 5, dtype=torch.float64)
    s = 3 / (math.sqrt(2) if rslora else 2)
    want = model[0].base(x)
    want[:, 0:3] += s * x @ a[:2].T @ b[:3].T
    want[:, 6:9] += s * x @ a[2:].T @ b[3:].T
    torch.testing.assert_close(model(x), want, **EXACT)
    with lora.merged(model):
        torch.testing.assert_close(model(x), want, **EXACT)
    assert torch.equal(model(x)[:, 3:6], model[0].base(x)[:, 3:6])  # k is the base's, bit for bit


def test_slices_train_only_their_blocks():
    model, whole = adapted(targets="c_attn[q,v]"), adapted(targets="c_attn")
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
    model = adapted(targets="c_attn[q,v]", alpha=3, rslora=rslora)
    goes_round(model, tmp_path)
    drop_metadata(tmp_path)
    plain = tiny_gpt2()  # without our metadata it is a plain adapter of twice the rank
    lora.load(plain, tmp_path)
    torch.testing.assert_close(plain(IDX), model(IDX), **CLOSE)
    assert lora.count_parameters(plain).trainable > lora.count_parameters(model).trainable


def test_values_outside_the_slices_are_refused(tmp_path):
    lora.save(adapted(targets="c_attn[q,v]"), tmp_path)

    def spoil(tensors):
        tensors[f"base_model.model.{H}.0.attn.c_attn.lora_B.weight"][20, 0] = 1.0

    edit(tmp_path, spoil)
    refuses(tiny_gpt2(), tmp_path, r"h.0.attn.c_attn: B has values outside the slices q, v")


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
    torch.testing.assert_close(wte(IDX), expected[IDX], **EXACT)
    with lora.merged(model):
        torch.testing.assert_close(wte(IDX), expected[IDX], **EXACT)


@pytest.mark.parametrize("routed", [False, True])
def test_the_row_of_padding_is_not_trained(routed):
    model = nn.Sequential(nn.Embedding(4, 3, padding_idx=1))
    lora.inject(model, r=2, targets="0")
    with lora.routed(model, ["default"] * 2) if routed else nullcontext():
        model(torch.tensor([[0, 1], [1, 3]])).sum().backward()
    grad = model[0].updates["default"].A.grad  # (r, ids)
    assert grad.any(0).tolist() == [True, False, False, True]


def test_embeddings_go_to_peft_and_come_back(tmp_path):
    goes_round(adapted(targets=("wpe", "c_attn")), tmp_path / "ours")
    torch.manual_seed(0)
    targets = {"target_modules": ["wpe", "c_fc"], "fan_in_fan_out": True}
    config = peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **targets)
    theirs = peft.get_peft_model(twin(tiny_gpt2()), config).eval()
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
    lora.eject(adapted(model, targets=("lm_head", "c_attn")), merge=True)
    assert raw(model(IDX)) == want
    assert raw(model.transformer.wte.weight) == wte
    assert all(p.requires_grad for p in model.parameters())


# Training


def test_parameter_groups_give_the_factor_that_starts_at_zero_its_own_rate():
    """That is B, but A of an embedding."""
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 6))
    model[1].slices = ("q", "v")
    lora.inject(model, r=2, targets=("0", "1[q]"), seed=0)
    slow, fast = lora.parameter_groups(model, 1e-3, b_ratio=8)
    embedding, linear = (layer.updates["default"] for layer in model)
    assert not embedding.A.any()
    assert not linear.B.any()
    assert {id(p) for p in fast["params"]} == {id(embedding.A), id(linear.B)}
    assert {id(p) for p in slow["params"]} == {id(embedding.B), id(linear.A)}
    assert (slow["lr"], fast["lr"]) == (1e-3, 8e-3)
    randomize(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(torch.arange(7)).square().mean().backward()
    torch.optim.SGD([slow, fast]).step()
    for name, p in model.named_parameters():
        if ".updates." in name:
            rate = 8e-3 if name[0] + name[-1] in ("0A", "1B") else 1e-3
            torch.testing.assert_close(p.detach(), before[name] - rate * p.grad)


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
