"""How an adapter's files take their places: both or none, whoever writes, reads or dies."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest
import torch

import lora
from lora.disk import checkpoint, files, folder
from lora.disk.writing import replacing
from tests.test_checkpoint import contents, edit
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


def test_two_writers_and_a_reader_never_mix_two_saves(tmp_path):
    models, stop, broken = {1: adapted(1), 50: adapted(50, r=3)}, threading.Event(), []

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
    assert {frozenset(alphas) for alphas in found} == {frozenset({1.0}), frozenset({50.0})}
    assert sorted(p.name for p in tmp_path.iterdir()) == [checkpoint.CONFIG, checkpoint.WEIGHTS]


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
    with pytest.raises(
        ValueError, match="does not say what it said when .* Save the adapter again"
    ):
        lora.load(model, tmp_path, allow_base_mismatch=True)
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="a save was interrupted between the two"):
        lora.algebra.read(tmp_path)
    lora.save(adapted(50), tmp_path)
    assert loaded(tmp_path) == {50.0}
    assert sorted(p.name for p in tmp_path.iterdir()) == [checkpoint.CONFIG, checkpoint.WEIGHTS]


def test_a_reader_in_the_middle_of_a_save_waits_for_its_end(tmp_path):
    lora.save(adapted(1), tmp_path / "old")
    lora.save(adapted(50), tmp_path)
    new = (tmp_path / checkpoint.CONFIG).read_bytes()
    (tmp_path / checkpoint.CONFIG).write_bytes((tmp_path / "old" / checkpoint.CONFIG).read_bytes())
    (tmp_path / "new").write_bytes(new)
    timer = threading.Timer(0.05, os.replace, (tmp_path / "new", tmp_path / checkpoint.CONFIG))
    timer.start()
    assert loaded(tmp_path) == {50.0}
    timer.join()


def test_what_a_living_writer_has_begun_stays(tmp_path):
    (tmp_path / ".saving-dead").mkdir()
    with replacing(tmp_path) as beside:
        assert not (tmp_path / ".saving-dead").exists()
        (beside / "mine").write_text("whole")
        lora.save(adapted(1), tmp_path)
        assert beside.is_dir()
    assert (tmp_path / "mine").read_text() == "whole"
    assert not list(tmp_path.glob(".saving-*"))


def test_an_error_while_writing_changes_nothing(tmp_path):
    lora.save(adapted(1), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(FileNotFoundError, match="of the body"), replacing(tmp_path) as beside:
        (beside / checkpoint.CONFIG).write_text("half")
        raise FileNotFoundError("of the body")
    assert contents(tmp_path) == before


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
        lora.save(adapted(1), tmp_path / "new", card=True)
        with replacing(tmp_path / "new") as beside:  # as safetensors' own writer does
            os.close(os.open(beside / "closed", os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    found = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "new").iterdir()}
    assert found == dict.fromkeys((*found,), mode)
    assert "closed" in found


def test_the_config_and_the_weights_are_told_to_be_one_save(tmp_path):
    lora.save(adapted(1), tmp_path)
    file = tmp_path / checkpoint.CONFIG
    fields = json.loads(file.read_text())
    notes = {"base_model_name_or_path": "org/base", "task_type": None, "inference_mode": False}
    file.write_text(json.dumps(fields | notes))  # says nothing else of what the adapter computes
    assert loaded(tmp_path) == {1.0}
    file.write_text(json.dumps(fields | {"lora_alpha": 2}))
    with pytest.raises(ValueError, match="or one was edited or replaced"):
        lora.load(MLP(), tmp_path)
    edit(tmp_path, lambda tensors: None, metadata={"format": "pt"})  # as PEFT's own files are
    model = MLP()
    lora.load(model, tmp_path)
    assert {c.alpha for c in lora.adapters(model)["default"].values()} == {2}


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
    assert len(metadata[folder.PAIR]) == 64


def test_reading_a_torn_folder_ends(tmp_path):
    lora.save(adapted(1), tmp_path)
    file = tmp_path / checkpoint.CONFIG
    file.write_text(file.read_text().replace('"r": 2', '"r": 3'))
    began = time.perf_counter()
    with pytest.raises(ValueError, match="Save the adapter again"):
        lora.load(MLP(), tmp_path)
    assert time.perf_counter() - began < 5
