"""How an adapter's files take their places, whoever writes, edits or dies."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import warnings

import pytest
import torch

import lora
from lora.disk import checkpoint, files
from tests.folders import edit
from tests.toys import MLP, snapshot


def adapted(alpha: float, r: int = 2) -> MLP:
    """A model whose adapter has alpha everywhere in its factors too."""
    torch.manual_seed(0)
    model = MLP()
    lora.inject(model, r=r, alpha=alpha, targets=("up", "down"))
    with torch.no_grad():
        for parameter in lora.trainable_parameters(model):
            parameter.fill_(alpha)
    return model


def loaded(place) -> set[float]:
    """The alphas that a loaded adapter has in its config and in its factors: one, if whole."""
    model = MLP()
    lora.load(model, place, allow_base_mismatch=True)
    (configs,) = lora.adapters(model).values()
    values = {float(p.detach().flatten()[0]) for p in lora.trainable_parameters(model)}
    return {config.alpha for config in configs.values()} | values


def test_of_two_writers_one_wins_whole(tmp_path):
    """Adapters of one config; their values never mix, and nothing is left beside the two files."""
    models, stop, broken = {1: adapted(1), 50: adapted(50)}, threading.Event(), []
    for model in models.values():
        for layer in (model.up, model.down):
            update = layer.updates["default"]
            update.config = dataclasses.replace(update.config, alpha=7)

    def write(model):
        while not stop.is_set():
            try:
                lora.save(model, tmp_path)
            except Exception as error:  # told below, by the test's own thread
                broken.append(error)
                raise

    lora.save(models[1], tmp_path)
    threads = [threading.Thread(target=write, args=(model,)) for model in models.values()]
    for thread in threads:
        thread.start()
    try:
        found = [loaded(tmp_path) for _ in range(300)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not broken
    assert {frozenset(alphas) for alphas in found} == {frozenset({1.0, 7}), frozenset({50.0, 7})}
    assert sorted(p.name for p in tmp_path.iterdir()) == [checkpoint.CONFIG, checkpoint.WEIGHTS]


def test_a_second_writer_waits_until_the_first_has_moved_both_files(tmp_path, monkeypatch):
    replace = os.replace
    second = threading.Thread(target=lora.save, args=(adapted(50), tmp_path))

    def between(*arguments):
        replace(*arguments)
        if second.ident is None:
            second.start()
            second.join(0.5)

    monkeypatch.setattr(os, "replace", between)
    lora.save(adapted(1), tmp_path)
    second.join()
    assert loaded(tmp_path) == {50.0}


KILLED = """
import os, signal, sys
import lora
from tests.test_saving import adapted

replace, done = os.replace, []

def once(*arguments):
    if done:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*arguments)
    done.append(True)

os.replace = once
lora.save(adapted(50), sys.argv[1])
"""


def test_a_kill_between_the_two_files_is_told_and_the_next_save_mends_it(tmp_path):
    lora.save(adapted(1), tmp_path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=os.getcwd())
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".saving-*"))) == 1
    model = MLP()
    before = snapshot(model)
    words = "a save was interrupted before adapter_config.json. Save again"
    with pytest.raises(ValueError, match=words):
        lora.load(model, tmp_path, allow_base_mismatch=True)
    assert snapshot(model) == before
    with pytest.raises(ValueError, match=words):
        lora.algebra.read(tmp_path)
    lora.save(adapted(50), tmp_path)
    assert loaded(tmp_path) == {50.0}
    lora.save(adapted(3), tmp_path)
    edit_alpha(tmp_path, 4)
    with pytest.warns(UserWarning, match="was edited"):  # what the kill left does not matter here
        assert loaded(tmp_path) == {3.0, 4}


def edit_alpha(folder, alpha: float) -> None:
    file = folder / checkpoint.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": alpha}))


def test_a_folder_in_a_files_place_is_seen_before_anything_moves(tmp_path):
    lora.save(adapted(1), tmp_path)
    (tmp_path / checkpoint.WEIGHTS).unlink()
    (tmp_path / checkpoint.WEIGHTS).mkdir()
    before = (tmp_path / checkpoint.CONFIG).read_bytes()
    with pytest.raises(IsADirectoryError, match=checkpoint.WEIGHTS):
        lora.save(adapted(50), tmp_path)
    assert (tmp_path / checkpoint.CONFIG).read_bytes() == before


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes_are_as_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        lora.save(adapted(1), tmp_path / "new", notes={})
    finally:
        os.umask(before)
    found = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "new").iterdir()}
    assert found == dict.fromkeys((checkpoint.CONFIG, checkpoint.WEIGHTS, "README.md"), mode)


def test_an_edited_alpha_loads_with_a_warning(tmp_path):
    lora.save(adapted(1), tmp_path)
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
    with pytest.warns(UserWarning, match=words) as caught:
        lora.load(model, tmp_path, allow_base_mismatch=True)
    assert [w.filename for w in caught] == [__file__]
    assert {c.alpha for c in lora.adapters(model)["default"].values()} == {2}
    with pytest.warns(UserWarning, match=words) as caught:
        value = lora.algebra.read(tmp_path)
    assert [w.filename for w in caught] == [__file__]
    assert value.keys() == {"up", "down"}
    edit(tmp_path, lambda tensors: None, metadata={"format": "pt"})  # as PEFT's own files are
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loaded(tmp_path) == {1.0, 2}


def test_a_file_that_changes_later_changes_no_loaded_model(tmp_path):
    lora.save(adapted(3), tmp_path)
    model = MLP()
    lora.load(model, tmp_path, allow_base_mismatch=True)
    file = tmp_path / checkpoint.WEIGHTS
    file.write_bytes(bytes(file.stat().st_size))
    file.write_bytes(b"")
    assert {float(p.detach().flatten()[0]) for p in lora.trainable_parameters(model)} == {3.0}


def test_metadata_names_the_digest(tmp_path):
    lora.save(adapted(1), tmp_path)
    _, metadata = files.read(tmp_path / checkpoint.WEIGHTS)
    assert len(metadata[checkpoint.DIGEST]) == 64
