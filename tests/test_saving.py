"""Saving: PEFT's format, the same bytes, all or nothing, whoever writes, edits or dies."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import warnings

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora
from lora.disk import checkpoint
from tests.folders import C_ATTN, contents, drop_metadata, filled, refuses
from tests.toys import MLP, adapted, tiny_gpt2

FILES = [checkpoint.CONFIG, checkpoint.WEIGHTS]


def loaded(folder) -> set[float]:
    """The alphas that a loaded adapter has in its config and in its factors: one, if whole."""
    model = MLP()
    lora.load(model, folder, allow_base_mismatch=True)
    (configs,) = lora.adapters(model).values()
    values = {float(p.detach().flatten()[0]) for p in lora.trainable_parameters(model)}
    return {config.alpha for config in configs.values()} | values


# What is written


def test_the_format_is_pefts(saved, tmp_path):
    folder, _ = saved
    assert sorted(p.name for p in folder.iterdir()) == FILES
    tensors = safetensors.torch.load_file(folder / checkpoint.WEIGHTS)
    assert tensors[f"{C_ATTN}.lora_A.weight"].shape == (4, 16)
    assert tensors[f"{C_ATTN}.lora_B.weight"].shape == (48, 4)
    assert len(tensors) == 8
    config = json.loads((folder / checkpoint.CONFIG).read_text())
    assert config["target_modules"] == ["c_attn", "c_fc"]
    assert list(config) == sorted(config)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6, 0.25)
    assert config["fan_in_fan_out"] is True
    model = filled(1)
    model.name_or_path = "org/base"
    lora.save(model, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / checkpoint.CONFIG).read_text())
    assert config["fan_in_fan_out"] is False
    assert config["base_model_name_or_path"] == "org/base"
    lora.save(adapted(targets="attn.c_proj"), tmp_path / "paths")  # c_proj ends other layers too
    config = json.loads((tmp_path / "paths" / checkpoint.CONFIG).read_text())
    assert config["target_modules"] == [f"transformer.h.{i}.attn.c_proj" for i in (0, 1)]


def test_the_same_adapter_gives_the_same_bytes_in_another_process_and_merged(saved, tmp_path):
    folder, _ = saved
    model = tiny_gpt2()
    lora.load(model, folder)
    with lora.merged(model):
        lora.save(model, folder, notes={"loss": 0.5})
    code = (
        "import lora; from tests.toys import tiny_gpt2; m = tiny_gpt2(); "
        f"lora.load(m, {str(folder)!r}); "
        f"lora.save(m, {str(tmp_path / 'other')!r}, notes={{'loss': 0.5}}); "
        "import sys; assert 'huggingface_hub' not in sys.modules"  # which is slow
    )
    env = os.environ | {"PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=os.getcwd())
    assert contents(tmp_path / "other") == contents(folder)
    assert len(contents(folder)) == 3


class Counting(TorchDispatchMode):
    """Counts the elements that operations read or make, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in (*args, out) if isinstance(t, Tensor)]
            made = func is torch.ops.aten.index.Tensor  # reads no more than it makes
            self.elements += sum(t.numel() for t in (tensors[-1:] if made else tensors))
        return out


def test_a_save_and_a_load_read_some_entries_of_the_base(tmp_path):
    model = nn.Sequential(nn.Linear(400, 500, bias=False), nn.Embedding(500, 400))
    lora.inject(model, r=1, targets=("0", "1"))
    with Counting() as saving:
        lora.save(model, tmp_path)
    lora.eject(model)
    with Counting() as loading:
        lora.load(model, tmp_path)
    factors = 2 * (400 + 500)
    assert factors < saving.elements < 20 * factors < 400 * 500
    assert factors < loading.elements < 20 * factors


def test_what_cannot_be_saved(saved, tmp_path):
    folder, _ = saved
    before = contents(folder)
    model = tiny_gpt2()
    with pytest.raises(RuntimeError, match="carries no adapter"):
        lora.save(model, folder)
    lora.load(model, folder)
    with pytest.raises(ValueError, match="no adapter 'other'"):
        lora.save(model, folder, adapter="other")
    update = model.transformer.h[0].attn.c_attn.updates["default"]
    with torch.no_grad():
        update.B[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"Not saved: B of .*h.0.attn.c_attn has NaN or infinite"):
        lora.save(model, folder)
    for dtype in (torch.complex64, torch.float8_e4m3fn):
        update.A = nn.Parameter(torch.ones(4, 16).to(dtype), requires_grad=False)
        with pytest.raises(ValueError, match=f"Not saved: A of .*h.0.attn.c_attn is {dtype}"):
            lora.save(model, folder)
    with pytest.raises(NotImplementedError, match="meta tensor; no data"):
        lora.save(adapted().to("meta"), folder)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        lora.save(adapted(), tmp_path / "file")
    assert contents(folder) == before


def test_trained_parts_outside_the_adapter_are_said(tmp_path):
    model = adapted()
    for i in range(2):
        model.transformer.h[i].ln_1.requires_grad_(True)
    model.transformer.ln_f.requires_grad_(True)
    words = (
        r"Not saved: transformer\.h\.0\.ln_1\.weight; transformer\.h\.0\.ln_1\.bias; "
        r"transformer\.h\.1\.ln_1\.weight; .*ln_f\.bias\. Train it by modules_to_save"
    )
    with pytest.warns(UserWarning, match=words) as caught:
        lora.save(model, tmp_path)
    assert [w.filename for w in caught] == [__file__]
    assert (tmp_path / checkpoint.WEIGHTS).is_file()


def test_a_card_holds_base_targets_rank_and_notes(tmp_path):
    model = adapted(rank_pattern={"h.1.attn.c_attn": 3})
    lora.save(model, tmp_path)
    assert not (tmp_path / "README.md").exists()
    model.name_or_path = "openai-community/gpt2"
    lora.save(model, tmp_path, notes={"data": "legal.jsonl", "loss": 2.31})
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nbase_model: openai-community/gpt2\nlibrary_name: peft\n")
    rows = ("base | openai-community/gpt2", "targets | c_attn", "r | 2, 3")
    for row in (*rows, "data | legal.jsonl", "loss | 2.31"):
        assert f"\n| {row} |\n" in text
    lora.save(model, tmp_path, notes={"data": "new.jsonl"})  # ours is written anew
    assert "| data | new.jsonl |" in (tmp_path / "README.md").read_text()


def test_ones_own_readme_is_never_overwritten(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    lora.save(adapted(), tmp_path)
    with pytest.warns(UserWarning, match=r"README\.md was not written by lora\.save, and is kept"):
        lora.save(adapted(), tmp_path, notes={"data": "legal.jsonl"})
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / checkpoint.WEIGHTS).is_file()


# How the files take their places


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
        lora.save(adapted(), folder)
    assert contents(folder) == before  # and nothing left beside it


def test_of_two_writers_the_second_waits_until_the_first_has_moved_both_files(
    tmp_path, monkeypatch
):
    replace = os.replace
    second = threading.Thread(target=lora.save, args=(filled(50), tmp_path))

    def between(*arguments):
        replace(*arguments)
        if second.ident is None:
            second.start()
            second.join(0.5)

    monkeypatch.setattr(os, "replace", between)
    lora.save(filled(1), tmp_path)
    second.join()
    assert loaded(tmp_path) == {50.0}
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES


KILLED = """
import os, signal, sys
import lora
from tests.folders import filled

replace, done = os.replace, []

def once(*arguments):
    if done:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*arguments)
    done.append(True)

os.replace = once
lora.save(filled(50), sys.argv[1])
"""


def test_a_kill_between_the_two_files_is_told_and_the_next_save_mends_it(tmp_path):
    lora.save(filled(1), tmp_path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=os.getcwd())
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".saving-*"))) == 1
    words = "a save was interrupted before adapter_config.json. Save again"
    refuses(MLP(), tmp_path, words, allow_base_mismatch=True)
    with pytest.raises(ValueError, match=words):
        lora.algebra.read(tmp_path)
    lora.save(filled(50), tmp_path)
    assert loaded(tmp_path) == {50.0}
    lora.save(filled(3), tmp_path)
    edit_alpha(tmp_path, 4)
    with pytest.warns(UserWarning, match="was edited"):  # what the kill left does not matter here
        assert loaded(tmp_path) == {3.0, 4}


def edit_alpha(folder, alpha: float) -> None:
    file = folder / checkpoint.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": alpha}))


def test_a_folder_in_a_files_place_is_seen_before_anything_moves(tmp_path):
    lora.save(filled(1), tmp_path)
    (tmp_path / checkpoint.WEIGHTS).unlink()
    (tmp_path / checkpoint.WEIGHTS).mkdir()
    before = (tmp_path / checkpoint.CONFIG).read_bytes()
    with pytest.raises(IsADirectoryError, match=checkpoint.WEIGHTS):
        lora.save(filled(50), tmp_path)
    assert (tmp_path / checkpoint.CONFIG).read_bytes() == before


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes_are_as_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        lora.save(filled(1), tmp_path / "new", notes={})
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "new").iterdir()}
    assert modes == dict.fromkeys((*FILES, "README.md"), mode)


def test_an_edited_alpha_loads_with_a_warning(tmp_path):
    lora.save(filled(1), tmp_path)
    file = tmp_path / checkpoint.CONFIG
    fields = json.loads(file.read_text())
    notes = {"base_model_name_or_path": "org/base", "task_type": None, "inference_mode": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file.write_text(json.dumps(fields | notes))  # says nothing else of what is computed
        assert loaded(tmp_path) == {1.0}
    edit_alpha(tmp_path, 2)
    model = MLP()
    words = r"adapter_config\.json was edited after adapter_model\.safetensors was saved"
    for call in (
        lambda: lora.load(model, tmp_path, allow_base_mismatch=True),
        lambda: lora.algebra.read(tmp_path),
    ):
        with pytest.warns(UserWarning, match=words) as caught:
            assert set(call()) == {"up", "down"}
        assert [w.filename for w in caught] == [__file__]
    assert {c.alpha for c in lora.adapters(model)["default"].values()} == {2}
    drop_metadata(tmp_path)  # as PEFT's own files are
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loaded(tmp_path) == {1.0, 2}


def test_a_file_that_changes_later_changes_no_loaded_model(tmp_path):
    lora.save(filled(3), tmp_path)
    model = MLP()
    lora.load(model, tmp_path, allow_base_mismatch=True)
    file = tmp_path / checkpoint.WEIGHTS
    file.write_bytes(bytes(file.stat().st_size))
    file.write_bytes(b"")
    assert {float(p.detach().flatten()[0]) for p in lora.trainable_parameters(model)} == {3.0}
