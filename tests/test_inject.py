"""Injecting and ejecting: what is reached, what is frozen, what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gpt2
import lora
from tests.toys import IDX, MLP, TINY, randomize, raw, snapshot, tiny_gpt2

ALL = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


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


def test_count_prints_as_peft_does_at_124m():
    with torch.device("meta"):
        model = gpt2.GPT2(gpt2.SIZES["gpt2"])
    lora.inject(model, r=8, alpha=16)
    assert str(lora.count_parameters(model)) == (
        "trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.2364"
    )


@pytest.mark.parametrize(
    ("name", "attention", "every"),
    [
        ("gpt2-medium", 786_432, 3_145_728),
        ("gpt2-large", 1_474_560, 5_898_240),
        ("gpt2-xl", 2_457_600, 9_830_400),
    ],
)
def test_counts_of_the_larger_sizes(name, attention, every):
    for targets, expected in ((("c_attn",), attention), (ALL, every)):
        with torch.device("meta"):
            model = gpt2.GPT2(gpt2.SIZES[name])
        lora.inject(model, targets=targets)
        assert lora.count_parameters(model).trainable == expected


def test_a_target_is_matched_on_whole_segments():
    """`up` ends `block.up`, and neither `backup` nor `block.backup`."""

    def build() -> nn.Module:
        names = ("up", "backup", "block")
        model = nn.ModuleDict({name: nn.Linear(4, 4) for name in names[:2]})
        model["block"] = nn.ModuleDict({name: nn.Linear(4, 4) for name in names[:2]})
        return model

    assert lora.inject(build(), r=2, targets="up") == ["up", "block.up"]
    assert lora.inject(build(), r=2, targets="block.up") == ["block.up"]
    assert lora.inject(build(), r=2, targets=("up", "backup"), exclude="up") == [
        "backup", "block.backup"
    ]  # fmt: skip
    for part in ("u", "ock.up", "lock.backup"):
        with pytest.raises(ValueError, match=f"No module matches target '{part}'"):
            lora.inject(build(), r=2, targets=part)


@pytest.mark.parametrize(("verb", "most"), [("inject", 8), ("merge", 4), ("load", 9)])
def test_a_reader_of_a_verb_enters_few_files(tmp_path, verb, most):
    """The files of `lora` whose functions one call on the demo's shape runs."""
    model, entered = tiny_gpt2(), set()
    lora.inject(model, r=2)
    if verb == "load":
        lora.save(model, tmp_path)
    if verb != "merge":
        lora.eject(model)
    call = {
        "inject": lambda: lora.inject(model, r=2),
        "merge": lambda: lora.merge(model),
        "load": lambda: lora.load(model, tmp_path),
    }[verb]
    package = Path(lora.__file__).parent

    def enter(frame, event, argument):
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(package):
            entered.add(file.name)

    sys.setprofile(enter)
    try:
        call()
    finally:
        sys.setprofile(None)
    assert len(entered) <= most, entered


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


def test_a_seed_gives_the_same_adapter_whatever_the_order():
    factors = []
    for targets in (ALL, ALL[::-1]):
        model = tiny_gpt2()
        lora.inject(model, r=2, targets=targets, seed=7)
        factors.append({n: raw(p) for n, p in model.named_parameters() if ".updates." in n})
    assert factors[0] == factors[1]
    model = tiny_gpt2()
    lora.inject(model, r=2, targets="c_attn", seed=7)
    alone = {n: raw(p) for n, p in model.named_parameters() if ".updates." in n}
    assert alone.items() <= factors[0].items()
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


def test_dtype_and_device_follow_the_base_unless_asked():
    model = tiny_gpt2(dtype=torch.float64)
    lora.inject(model, r=2)
    assert {p.dtype for p in lora.trainable_parameters(model)} == {torch.float64}
    model = tiny_gpt2(dtype=torch.bfloat16)
    lora.inject(model, r=2, dtype=torch.bfloat16)
    assert {p.dtype for p in lora.trainable_parameters(model)} == {torch.bfloat16}
    with torch.device("meta"):
        model = gpt2.GPT2(TINY)
    lora.inject(model, r=2)
    assert all(p.is_meta for p in lora.trainable_parameters(model))


def test_eject_is_exact_by_identity():
    model = tiny_gpt2()
    model.transformer.wpe.weight.requires_grad_(False)  # the caller's own choice survives too
    before = snapshot(model)
    lora.inject(model, r=4, targets=ALL)
    randomize(model)
    lora.eject(model)
    assert snapshot(model) == before


def test_eject_with_merge_keeps_the_merged_weights():
    model = tiny_gpt2()
    lora.inject(model, r=4, targets=ALL)
    randomize(model)
    with lora.merged(model):
        want = model(IDX)
    names = set(tiny_gpt2().state_dict())
    lora.eject(model, merge=True)
    assert torch.equal(model(IDX), want)
    assert set(model.state_dict()) == names


def test_the_mode_of_the_base_is_taken_over():
    model = tiny_gpt2().train()
    lora.inject(model, r=2, dropout=0.5)
    assert all(m.training for m in model.modules())
    lora.eject(model)
    lora.inject(model.eval(), r=2, dropout=0.5)
    assert not any(m.training for m in model.modules())


def test_without_adapters_every_call_says_so():
    for call in (lora.eject, lora.merge, lora.unmerge, lora.is_merged):
        with pytest.raises(RuntimeError, match="carries no adapter"):
            call(tiny_gpt2())
    for context in (lora.disabled, lora.merged):
        with pytest.raises(RuntimeError, match="carries no adapter"), context(tiny_gpt2()):
            pass
