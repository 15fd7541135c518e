"""Saving and loading: byte-reproducible, strict both ways, all or nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

import lora
from lora.disk import checkpoint
from lora.disk.folder import PAIR
from tests.toys import MLP, TINY, randomize, raw, snapshot, tiny_gpt2

IDX = torch.randint(0, TINY.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
C_ATTN = "base_model.model.transformer.h.0.attn.c_attn"


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter for `tiny_gpt2`, and the logits it gives."""
    model = tiny_gpt2()
    lora.inject(model, r=4, alpha=6, dropout=0.25, targets=("c_attn", "mlp.c_fc"), seed=0)
    randomize(model)
    lora.save(model, tmp_path / "adapter")
    return tmp_path / "adapter", model(IDX)


def edit(folder, change, metadata="keep") -> None:
    """Rewrite the tensors of a saved adapter."""
    file = folder / checkpoint.WEIGHTS
    with safe_open(file, "pt") as f:
        tensors, kept = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()  # noqa: SIM118
    change(tensors)
    safetensors.torch.save_file(tensors, file, kept if metadata == "keep" else metadata)


def edit_config(folder, **fields) -> None:
    """Rewrite the config of a saved adapter, in weights that do not say which one is theirs."""
    file = folder / checkpoint.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with safe_open(folder / checkpoint.WEIGHTS, "pt") as f:
        metadata = {key: value for key, value in f.metadata().items() if key != PAIR}
    edit(folder, lambda tensors: None, metadata)


def refuses(model, folder, words, error=ValueError, **arguments) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=words):
        lora.load(model, folder, **arguments)
    assert snapshot(model) == before


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


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_the_same_adapter_gives_the_same_bytes_in_another_process(saved, tmp_path):
    folder, _ = saved
    code = (
        "import sys; from tests.test_checkpoint import *; m = tiny_gpt2(); "
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
    lora.load(model, folder)
    assert torch.equal(model(IDX), want)


def test_all_faults_are_listed_at_once(saved):
    folder, _ = saved

    def spoil(tensors):
        del tensors[f"{C_ATTN}.lora_B.weight"]
        tensors["base_model.model.transformer.h.1.mlp.c_fc.lora_A.weight"] = torch.ones(3, 16)
        tensors["base_model.model.transformer.h.7.attn.c_attn.lora_A.weight"] = torch.ones(4, 16)
        tensors["base_model.model.lm_head.weight"] = torch.ones(2)
        tensors["base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"][0, 0] = torch.nan

    edit(folder, spoil)
    refuses(
        tiny_gpt2(),
        folder,
        r"(?s)(?=.*h.0.attn.c_attn: lora_B is missing)"
        r"(?=.*h.1.mlp.c_fc: lora_A is \(3, 16\), this layer takes \(4, 16\))"
        r"(?=.*h.7.attn.c_attn: no such layer here)"
        r"(?=.*lm_head.weight: left over)"
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
    refuses(build(n_layer=3), folder, "h.2.attn.c_attn: no tensors in the file")
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


def test_a_base_of_another_size_is_refused(saved):
    """Of the same direction in every weight, so that only its norm tells it from the other."""
    model = tiny_gpt2()
    with torch.no_grad():
        for p in model.parameters():
            p *= 1.01
    refuses(model, saved[0], "made for another base")


def test_swapped_factors_of_a_square_layer_are_detected(tmp_path):
    """With in = out, B transposed has A's shape: only the stored probe tells."""
    torch.manual_seed(0)
    model = MLP(6, 6)
    lora.inject(model, r=6, targets="up")
    randomize(model)
    lora.save(model, tmp_path)

    def swap(tensors):
        a, b = (f"base_model.model.up.lora_{f}.weight" for f in "AB")
        tensors[a], tensors[b] = tensors[b].t().contiguous(), tensors[a].t().contiguous()

    edit(tmp_path, swap)
    lora.eject(model)
    refuses(model, tmp_path, r"up: A and B are not the ones that were saved \(transposed")


def test_files_without_our_metadata_load(saved):
    folder, want = saved
    edit(folder, lambda tensors: None, metadata={"format": "pt"})
    model = tiny_gpt2()
    lora.load(model, folder)
    assert torch.equal(model(IDX), want)
    lora.load(tiny_gpt2(seed=5), folder)  # nothing to tell another base by


def test_broken_files(saved, tmp_path):
    folder, _ = saved
    refuses(tiny_gpt2(), tmp_path / "nowhere", "is missing", FileNotFoundError)
    file = folder / checkpoint.WEIGHTS
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:4], b"", b"not a safetensors file" * 9):
        file.write_bytes(content)
        refuses(tiny_gpt2(), folder, "no intact safetensors file")
    file.unlink()
    refuses(tiny_gpt2(), folder, f"{checkpoint.WEIGHTS} is missing", FileNotFoundError)
    (folder / checkpoint.CONFIG).write_bytes(b"\xff{")
    refuses(tiny_gpt2(), folder, "is not JSON")
    (folder / checkpoint.CONFIG).write_text("[]")
    refuses(tiny_gpt2(), folder, "holds a list")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base weights"),
        ({"init_lora_weights": "olora", "use_dora": True}, r"changed the base.*use_dora"),
        ({"some_future_field": 3}, "some_future_field is 3, which is not supported"),
        ({"target_modules": []}, "target_modules is missing"),
        ({"target_modules": "("}, "target_modules"),
        ({"target_modules": 5}, "target_modules"),
        ({"r": 0}, "r must be"),
        ({"r": None}, "r must be"),
        ({"lora_alpha": -1}, "alpha must be"),
        ({"rank_pattern": {"c_attn": -2}}, "r must be"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern"),
        ({"rank_pattern": [1]}, "rank_pattern is"),
        ({"layers_to_transform": "x"}, "layers_to_transform"),
    ],
)
def test_configs_that_are_refused(saved, fields, words):
    folder, _ = saved
    edit_config(folder, **fields)
    refuses(tiny_gpt2(), folder, words)


def test_what_the_config_says_and_the_file_lacks(saved):
    folder, _ = saved
    edit_config(folder, target_modules=["c_attn"])
    refuses(tiny_gpt2(), folder, "h.0.mlp.c_fc: not a target of the config")
    edit_config(folder, target_modules=["c_attn", "c_fc", "c_proj"])
    refuses(tiny_gpt2(), folder, "h.0.attn.c_proj: no tensors in the file")


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


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fills_up_leaves_the_previous_adapter(saved, monkeypatch, call):
    folder, _ = saved
    before = contents(folder)

    def full(*_):
        raise OSError(28, "No space left on device")

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
