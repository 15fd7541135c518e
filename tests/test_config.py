"""What an adapter is made of, as a value and as keywords."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle

import numpy as np
import pytest
import torch

import lora
from lora.config import PEFT_NAMES
from tests.toys import TINY, randomize, tiny_gpt2


def test_a_config_and_its_fields_as_keywords_are_the_same():
    ours, theirs = tiny_gpt2(), tiny_gpt2()
    config = lora.LoRAConfig(r=3, alpha=5, targets=("c_attn[q,v]", "c_fc"), seed=7)
    assert lora.inject(ours, config, adapter="a") == lora.inject(
        theirs, adapter="a", **dataclasses.asdict(config)
    )
    assert lora.adapters(ours) == lora.adapters(theirs)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_pefts_names_of_our_fields_are_told_ours():
    ours = {field.name for field in dataclasses.fields(lora.LoRAConfig)}
    assert set(PEFT_NAMES.values()) <= ours
    for theirs, name in PEFT_NAMES.items():
        with pytest.raises(TypeError, match=f"'{theirs}'; did you mean {name}"):
            lora.inject(tiny_gpt2(), **{theirs: None})


def test_the_renamed_fields_are_pefts():
    peft = pytest.importorskip("peft", reason="PEFT names its own fields")
    theirs = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert set(PEFT_NAMES) - theirs == {"rank"}


def test_a_config_is_an_ordinary_dataclass():
    config = lora.LoRAConfig(r=3, targets=["c_fc"])
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, r=4).targets == ("c_fc",)
    names = [field.name for field in dataclasses.fields(config)]
    assert list(inspect.signature(lora.LoRAConfig).parameters) == names


@pytest.mark.parametrize(
    ("arguments", "plain"),
    [
        ({"r": np.int64(3)}, {"r": 3}),
        ({"r": np.uint8(3)}, {"r": 3}),
        ({"alpha": np.float32(0.5)}, {"alpha": 0.5}),
        ({"alpha": np.int32(7)}, {"alpha": 7}),
        ({"dropout": np.float32(0.25)}, {"dropout": 0.25}),
        ({"seed": np.int64(5)}, {"seed": 5}),
        ({"layers": np.arange(2)}, {"layers": (0, 1)}),
        ({"layers": [np.int64(1)]}, {"layers": (1,)}),
        ({"layers": 1}, {"layers": (1,)}),
        ({"layers": np.int64(1)}, {"layers": (1,)}),
        ({"rank_pattern": {"c_attn": np.int64(2)}}, {"rank_pattern": {"c_attn": 2}}),
        ({"alpha_pattern": {"c_attn": np.float64(2.5)}}, {"alpha_pattern": {"c_attn": 2.5}}),
        ({"rslora": np.True_}, {"rslora": True}),
    ],
)
def test_numpys_numbers_are_as_good_as_pythons(tmp_path, arguments, plain):
    config = lora.LoRAConfig(**arguments)
    assert config == lora.LoRAConfig(**plain)
    assert repr(config) == repr(lora.LoRAConfig(**plain))
    model, same = tiny_gpt2(), tiny_gpt2()
    paths = lora.inject(model, **{"seed": 0} | arguments)
    assert paths == lora.inject(same, **{"seed": 0} | plain)
    assert len(paths) == (1 if plain.get("layers") == (1,) else TINY.n_layer)
    assert lora.adapters(model) == lora.adapters(same)
    randomize(model)
    lora.save(model, tmp_path)  # its config is JSON
    assert lora.load(tiny_gpt2(), tmp_path) == paths


def test_equal_configs_have_equal_hashes():
    settings = {"rank_pattern": {"a": 1}, "alpha_pattern": {"b": 2.0}, "slices": {"q": 1, "k": 2}}
    config, other = lora.LoRAConfig(**settings), lora.LoRAConfig(**settings)
    assert hash(config) == hash(other)
    assert {config: 1}[other] == 1
    assert config != lora.LoRAConfig(**settings | {"rank_pattern": {"a": 2}})


def test_an_iterator_is_as_good_as_a_list():
    config = lora.LoRAConfig(targets=(t for t in ["c_attn"]), layers=iter([0, 1]))
    assert config.targets == ("c_attn",)
    assert config.layers == (0, 1)
    assert config == lora.LoRAConfig(targets=["c_attn"], layers=range(2))
