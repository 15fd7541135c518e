"""What an adapter is made of, as a value and as keywords."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import pickle
import re
import typing

import pytest
import torch

import lora
from lora.foreign import MISSING, NEEDLESS, PEFT_NAMES
from lora.settings import LoRASettings
from tests.toys import snapshot, tiny_gpt2

# The fields of PEFT's LoraConfig, 0.17 to 0.21.
PEFTS = """
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r
    target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora
    modules_to_save init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern
    megatron_config megatron_core trainable_token_indices loftq_config eva_config corda_config
    lora_ga_config use_dora velora_config alora_invocation_tokens use_qalora qalora_group_size
    monteclora_config layer_replication runtime_config lora_bias target_parameters use_bdlora
    arrow_config kasa_config ensure_weight_tying
""".split()


def test_the_keywords_of_inject_are_the_fields_of_the_config():
    fields = typing.get_type_hints(lora.LoRAConfig)
    assert fields == typing.get_type_hints(LoRASettings)


def test_a_config_and_its_fields_as_keywords_are_the_same():
    ours, theirs = tiny_gpt2(), tiny_gpt2()
    config = lora.LoRAConfig(r=3, alpha=5, targets=("c_attn[q,v]", "c_fc"), seed=7)
    assert lora.inject(ours, config, adapter="a") == lora.inject(
        theirs, adapter="a", **dataclasses.asdict(config)
    )
    assert lora.adapters(ours) == lora.adapters(theirs)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lora_alpha": 16}, "'lora_alpha' is PEFT's name: here it is alpha"),
        ({"target_modules": ["c_attn"]}, "'target_modules' is PEFT's name: here it is targets"),
        ({"fan_in_fan_out": True}, "the layer's class tells the layout"),
        ({"task_type": "CAUSAL_LM"}, "'task_type' is not needed"),
        ({"use_dora": True}, "'use_dora' is PEFT's, and not here: there is no DoRA.$"),
        ({"weights": 3}, "no argument 'weights'; there are: r, alpha"),
        ({"rank": 8}, r"no argument 'rank'; did you mean r\?$"),
        ({"rnak": 3, "lora_dropout": 0.1}, "no argument 'rnak'.*here it is dropout"),
        ({"rs_lora": True}, "did you mean rslora"),
        ({"config": lora.LoRAConfig(), "r": 4}, "Give a config or r, not both"),
        ({"config": lora.LoRAConfig(), "use_dora": True}, "there is no DoRA"),
        ({"config": {"r": 4}}, "config must be a lora.LoRAConfig"),
    ],
)
def test_unknown_keywords_are_told_ours(arguments, words):
    model = tiny_gpt2()
    before = snapshot(model)
    with pytest.raises(TypeError, match=words):
        lora.inject(model, **arguments)
    assert snapshot(model) == before


def test_every_field_of_pefts_config_is_ours_or_told_what_takes_its_place():
    ours = {field.name for field in dataclasses.fields(lora.LoRAConfig)}
    names = set(PEFTS)
    with contextlib.suppress(ImportError):  # and whatever the version that is here has
        from peft import LoraConfig

        names |= {field.name for field in dataclasses.fields(LoraConfig)}
    assert {"r", "bias", "rank_pattern", "alpha_pattern", "modules_to_save"} == names & ours
    for name in names - ours:
        for made in (lora.LoRAConfig, functools.partial(lora.inject, tiny_gpt2())):
            with pytest.raises(TypeError) as refusal:
                made(**{name: None})
            (told,) = re.findall(
                rf"^'{name}' is (?:PEFT's name: here it is (\w+)|not needed: .+"
                r"|PEFT's, and not here: .+)\.$",
                str(refusal.value),
            )
            assert not told or told in ours
    with pytest.raises(TypeError) as refusal:
        lora.LoRAConfig(**dict.fromkeys(names))
    assert len(str(refusal.value)) < 2000
    assert {*PEFT_NAMES, *NEEDLESS, *MISSING} - names == {"adapter_name"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"targets": ()}, "targets must name at least one layer"),
        ({"targets": 3}, "targets must be a name or several"),
        ({"targets": ["c_attn", None]}, "targets must be a name or several"),
        ({"exclude": {"a": 1}}, "exclude must be a name or several"),
        ({"layers": "01"}, "layers must be several block numbers"),
        ({"layers": [0.5]}, "layers must be several block numbers"),
        ({"rank_pattern": [1]}, "rank_pattern must map suffixes"),
        ({"alpha_pattern": {"c_attn": -1}}, "alpha_pattern must map suffixes"),
        ({"seed": 2**70}, "seed must be"),
        ({"dtype": torch.int8}, "dtype must be"),
        ({"dtype": torch.float8_e4m3fn}, "dtype must be"),
        ({"rslora": "yes"}, "rslora must be"),
        ({"r": 0, "alpha": -1, "seed": "x"}, "r must be.*alpha must be.*seed must be"),
    ],
)
def test_what_is_out_of_range_is_named_at_once(arguments, words):
    with pytest.raises(ValueError, match=words) as refusal:
        lora.LoRAConfig(**arguments)
    assert len(str(refusal.value)) < 500


def test_a_config_is_an_ordinary_dataclass():
    config = lora.LoRAConfig(r=3, targets=["c_fc"])
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, r=4).targets == ("c_fc",)
    names = [field.name for field in dataclasses.fields(config)]
    assert list(inspect.signature(lora.LoRAConfig).parameters) == names


def test_an_iterator_is_as_good_as_a_list():
    config = lora.LoRAConfig(targets=(t for t in ["c_attn"]), layers=iter([0, 1]))
    assert config.targets == ("c_attn",)
    assert config.layers == (0, 1)
    assert config == lora.LoRAConfig(targets=["c_attn"], layers=range(2))
