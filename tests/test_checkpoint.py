"""Saving and loading: byte-reproducible, strict both ways, all or nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import lora
from lora.disk import checkpoint
from tests.folders import C_ATTN, UNSLOTH, contents, edit, edit_config, refuses
from tests.toys import IDX, MLP, TINY, randomize, raw, tiny_gpt2


def test_round_trip(saved):
    folder, want = saved
    model = tiny_gpt2()
    paths = lora.load(model, folder)
    assert sorted(paths) == sorted(
        f"transformer.h.{i}.{n}" for i in (0, 1) for n in ("attn.c_attn", "mlp.c_fc")
    )
    assert torch.equal(model(IDX), want)
    config = model.transformer.h[0].attn.c_attn.updates["default"].config
    assert config == lora.UpdateConfig(r=4, alpha=6, dropout=0.25)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{p}.updates.default.{f}" for p in paths for f in "AB"
    }


def test_a_merged_model_saves_the_same_adapter(saved, tmp_path):
    folder, _ = saved
    model = tiny_gpt2()
    lora.load(model, folder)
    with lora.merged(model):
        lora.save(model, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


def test_the_same_adapter_gives_the_same_bytes_in_another_process(saved, tmp_path):
    folder, _ = saved
    code = (
        "import lora; from tests.toys import tiny_gpt2; m = tiny_gpt2(); "
        f"lora.load(m, {str(folder)!r}); lora.save(m, {str(tmp_path / 'other')!r})"
    )
    env = os.environ | {"PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=os.getcwd())
    assert contents(tmp_path / "other") == contents(folder)


def test_the_format_is_pefts(saved):
    folder, _ = saved
    assert sorted(p.name for p in folder.iterdir()) == [checkpoint.CONFIG, checkpoint.WEIGHTS]
    tensors = safetensors.torch.load_file(folder / checkpoint.WEIGHTS)
    assert tensors[f"{C_ATTN}.lora_A.weight"].shape == (4, 16)
    assert tensors[f"{C_ATTN}.lora_B.weight"].shape == (48, 4)
    assert len(tensors) == 8
    config = json.loads((folder / checkpoint.CONFIG).read_text())
    assert config["target_modules"] == ["c_attn", "c_fc"]
    assert list(config) == sorted(config)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6, 0.25)


OLD = Path(__file__).parent / "data" / "adapter_of_0_1"


def test_a_folder_of_an_earlier_version_loads():
    """It has slices, patterns, a module trained whole, and probes of base and factors."""
    model, plain = tiny_gpt2(), tiny_gpt2()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = lora.load(model, OLD)
    assert paths == [
        *(f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "mlp.c_fc")),
        "transformer.ln_f",
    ]
    tensors = safetensors.torch.load_file(OLD / checkpoint.WEIGHTS)
    scalings = {"h.0.attn.c_attn": 3, "h.0.mlp.c_fc": 2.5, "h.1.attn.c_attn": 3, "h.1.mlp.c_fc": 2}
    with torch.no_grad():
        for path, scaling in scalings.items():
            a, b = (
                tensors[f"base_model.model.transformer.{path}.lora_{f}.weight"].double()
                for f in "AB"
            )
            plain.get_submodule(f"transformer.{path}").weight += (scaling * b @ a).t()
        for name, p in plain.transformer.ln_f.named_parameters():
            p.copy_(tensors[f"base_model.model.transformer.ln_f.{name}"])
    torch.testing.assert_close(model(IDX), plain(IDX), rtol=1e-4, atol=1e-5)
    c_attn = model.transformer.h[0].attn.c_attn.updates["default"]
    assert c_attn.slices == {"q": [0, 16], "v": [32, 48]}
    assert c_attn.config == lora.UpdateConfig(r=4, alpha=12, dropout=0.25)


def test_the_config_names_the_base(tmp_path):
    model = tiny_gpt2()
    model.name_or_path = "gpt2"
    lora.inject(model, r=2)
    lora.save(model, tmp_path)
    config = json.loads((tmp_path / checkpoint.CONFIG).read_text())
    assert config["base_model_name_or_path"] == "gpt2"


def test_targets_are_written_so_that_they_match_no_other_layer(tmp_path):
    model = tiny_gpt2()
    lora.inject(model, r=2, targets="attn.c_proj")
    lora.save(model, tmp_path)
    targets = json.loads((tmp_path / checkpoint.CONFIG).read_text())["target_modules"]
    assert targets == [f"transformer.h.{i}.attn.c_proj" for i in (0, 1)]
    assert lora.load(tiny_gpt2(), tmp_path) == targets


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod."])
def test_keys_saved_through_a_wrapper_are_unwrapped(saved, wrapper):
    folder, want = saved

    def wrap(tensors):
        for key in list(tensors):
            tensors[key.replace("base_model.model.", f"base_model.model.{wrapper}")] = tensors.pop(
                key
            )

    edit(folder, wrap)
    model = tiny_gpt2()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The layers are called module")
        lora.load(model, folder)
    assert torch.equal(model(IDX), want)


def test_all_faults_are_listed_at_once(saved):
    folder, _ = saved

    def spoil(tensors):
        del tensors[f"{C_ATTN}.lora_B.weight"]
        tensors["base_model.model.transformer.h.1.mlp.c_fc.lora_A.weight"] = torch.ones(3, 16)
        tensors["base_model.model.transformer.h.7.attn.c_attn.lora_A.weight"] = torch.ones(4, 16)
        tensors["base_model.model.lm_head.weight"] = torch.ones(2)
        tensors["base_model.model.lm_head.lora_magnitude_vector"] = torch.ones(2)
        tensors["base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"][0, 0] = torch.nan

    edit(folder, spoil)
    refuses(
        tiny_gpt2(),
        folder,
        r"(?s)(?=.*h.0.attn.c_attn: lora_B is missing)"
        r"(?=.*h.1.mlp.c_fc: lora_B is \(64, 4\), this layer takes \(64, 3\))"
        r"(?=.*h.7.attn.c_attn: no such layer here)"
        r"(?=.*lm_head.weight is \(2,\), this model's is \(61, 16\))"
        r"(?=.*lm_head.lora_magnitude_vector: left over)"
        r"(?=.*h.1.attn.c_attn: lora_A has NaN)",
    )


def test_an_adapter_for_another_depth_width_or_base_is_refused(saved):
    folder, want = saved
    import gpt2

    def build(**sizes):
        torch.manual_seed(0)
        settings = {k: getattr(TINY, k) for k in ("n_layer", "n_head", "n_embd", "vocab_size")}
        return gpt2.GPT2(gpt2.GPT2Config(**settings | sizes)).eval()

    refuses(build(n_layer=1), folder, "h.1.attn.c_attn: no such layer here")
    refuses(build(n_layer=3), folder, "made for another base")
    refuses(build(n_embd=32), folder, r"lora_A is \(4, 16\), this layer takes \(4, 32\)")
    refuses(tiny_gpt2(seed=5), folder, "made for another base.*h.0.attn.c_attn")
    model = tiny_gpt2(seed=5)
    lora.load(model, folder, allow_base_mismatch=True)
    assert not torch.equal(model(IDX), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_dtype_is_accepted(saved, dtype):
    folder, want = saved
    model = tiny_gpt2(dtype=dtype)
    lora.load(model, folder)
    assert (model(IDX).float() - want).norm() < 0.1 * want.norm()


def test_a_slightly_tuned_base_is_another_base(saved):
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight.mul_(
            1 + 0.01 * torch.randn(16, 48, generator=torch.Generator().manual_seed(0))
        )
    refuses(model, saved[0], r"another base, whose weights differ in transformer.h.1.attn.c_attn ")


def test_files_without_our_metadata_load(saved):
    folder, want = saved
    edit(folder, lambda tensors: None, metadata={"format": "pt"})
    model = tiny_gpt2()
    lora.load(model, folder)
    assert torch.equal(model(IDX), want)
    lora.load(tiny_gpt2(seed=5), folder)  # nothing to tell another base by


def test_broken_files(saved, tmp_path):
    folder, _ = saved
    refuses(
        tiny_gpt2(),
        tmp_path / "nowhere",
        "has no adapter_config.json and no adapter_model",
        FileNotFoundError,
    )
    config = (folder / checkpoint.CONFIG).read_bytes()
    for content in (b"\xff{", b"[]", b"", b"{"):
        (folder / checkpoint.CONFIG).write_bytes(content)
        refuses(tiny_gpt2(), folder, "adapter_config.json: it is not a JSON object")
    (folder / checkpoint.CONFIG).write_bytes(config)
    file = folder / checkpoint.WEIGHTS
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:4], b"", b"not a safetensors file" * 9):
        file.write_bytes(content)
        refuses(tiny_gpt2(), folder, "is not an intact safetensors file")
    file.unlink()
    refuses(tiny_gpt2(), folder, f"has no {checkpoint.WEIGHTS}", FileNotFoundError)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "olora", "use_dora": True}, r"changed the base.*use_dora"),
        ({"some_future_field": 3}, "some_future_field is 3, which is not supported"),
        ({"lora_alpha": -1}, "alpha must be"),
        ({"lora_alpha": "x"}, "alpha cannot be 'x'"),
        ({"alpha_pattern": {"c_attn": "x"}}, "alpha cannot be 'x'"),
        ({"alpha_pattern": {"(": 1}}, "adapter_config.json: missing \\)"),
        ({"lora_dropout": 1}, r"dropout must be in \[0, 1\)"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq' changed"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying is True, which is not supported"),
        ({"modules_to_save": ["ln_f"]}, "modules_to_save names ln_f, of which the file has no"),
        ({"modules_to_save": "ln_f"}, "modules_to_save names ln_f, of which the file has no"),
        ({"target_parameters": ["w"]}, r"target_parameters is \['w'\], which is not supported"),
        ({"alora_invocation_tokens": [3]}, r"alora_invocation_tokens is \[3\]"),
        ({"layer_replication": [[0, 1]]}, r"layer_replication is \[\[0, 1\]\]"),
    ],
)
def test_configs_that_are_refused(saved, fields, words):
    folder, _ = saved
    edit_config(folder, **fields)
    refuses(tiny_gpt2(), folder, words)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": UNSLOTH},
        {"target_modules": ["c_proj"], "rank_pattern": {"c_attn": 64}, "r": 1},
        {"layers_pattern": "", "layers_to_transform": None, "exclude_modules": ""},
    ],
)
def test_the_tensors_tell_the_layers_and_the_ranks(saved, fields):
    folder, want = saved
    edit_config(folder, **fields)
    model = tiny_gpt2()
    assert len(lora.load(model, folder)) == 4
    assert torch.equal(model(IDX), want)


def test_loading_onto_a_merged_model_or_a_taken_name_is_refused(saved):
    folder, _ = saved
    model = tiny_gpt2()
    lora.load(model, folder)
    refuses(model, folder, "carries an adapter 'default' already")
    lora.merge(model)
    refuses(model, folder, "is merged", RuntimeError, adapter="second")


def test_what_cannot_be_saved(saved, tmp_path):
    folder, _ = saved
    before = contents(folder)
    model = tiny_gpt2()
    with pytest.raises(RuntimeError, match="carries no adapter"):
        lora.save(model, folder)
    lora.load(model, folder)
    with pytest.raises(ValueError, match="no adapter 'other'"):
        lora.save(model, folder, adapter="other")
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.updates["default"].B[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"Not saved: B of .*h.0.attn.c_attn has NaN or infinite values"
    ):
        lora.save(model, folder)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OSError, match="file"):
        lora.save(tiny_with_adapter(), file)
    assert contents(folder) == before


def tiny_with_adapter() -> nn.Module:
    model = tiny_gpt2()
    lora.inject(model, r=2)
    return model


@pytest.mark.parametrize(("call", "spared"), [("fsync", 0), ("fsync", 1), ("replace", 0)])
def test_a_disk_that_fills_up_leaves_the_previous_adapter(saved, monkeypatch, call, spared):
    """At the first file, or at the second."""
    folder, _ = saved
    before = contents(folder)
    original, calls = getattr(os, call), []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > spared:
            raise OSError(28, "No space left on device")
        original(*arguments)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        lora.save(tiny_with_adapter(), folder)
    assert contents(folder) == before  # and nothing left beside it


def test_other_files_in_the_folder_stay(saved):
    folder, _ = saved
    (folder / "README.md").write_text("mine")
    lora.save(tiny_with_adapter(), folder)
    assert (folder / "README.md").read_text() == "mine"


def test_a_plain_mlp_round_trips(tmp_path):
    torch.manual_seed(0)
    model = MLP()
    lora.inject(model, r=2, targets=("up", "down"))
    randomize(model)
    lora.save(model, tmp_path)
    assert json.loads((tmp_path / checkpoint.CONFIG).read_text())["fan_in_fan_out"] is False
    want = [raw(p) for p in lora.trainable_parameters(model)]
    lora.eject(model)
    lora.load(model, tmp_path)
    assert [raw(p) for p in lora.trainable_parameters(model)] == want
