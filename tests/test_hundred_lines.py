"""docs/lora_in_100_lines.py computes, learns and writes what the library does."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lora
from tests.toys import IDX, raw, tiny_gpt2

FILE = Path(__file__).parents[1] / "docs" / "lora_in_100_lines.py"
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def hundred():
    spec = importlib.util.spec_from_file_location("lora_in_100_lines", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def both(hundred):
    """A model each, with the same adapter, whose B is no longer zero."""
    ours, theirs = tiny_gpt2(), tiny_gpt2()
    lora.inject(ours, r=4, alpha=6, seed=0)
    hundred.inject(theirs, r=4, alpha=6)
    torch.manual_seed(1)
    with torch.no_grad():
        for path, layer in hundred.updates(theirs).items():
            update = ours.get_submodule(path).updates["default"]
            layer.A.copy_(update.A)
            layer.B.copy_(torch.randn(layer.B.shape) * 0.1)
            update.B.copy_(layer.B)
    return ours, theirs


def test_outputs_and_gradients_are_the_librarys_in_as_many_lines_as_it_says(hundred):
    assert FILE.read_text().count("\n") <= 100
    assert "import lora" not in FILE.read_text()
    ours, theirs = both(hundred)
    torch.testing.assert_close(theirs(IDX), ours(IDX), **CLOSE)
    theirs(IDX, IDX).backward()
    ours(IDX, IDX).backward()
    for path, layer in hundred.updates(theirs).items():
        update = ours.get_submodule(path).updates["default"]
        torch.testing.assert_close(layer.A.grad, update.A.grad, **CLOSE)
        torch.testing.assert_close(layer.B.grad, update.B.grad, **CLOSE)
    frozen = [p for n, p in theirs.named_parameters() if not n.endswith((".A", ".B"))]
    assert not any(p.requires_grad for p in frozen)


def test_training_is_the_librarys(hundred):
    ours, theirs = both(hundred)
    hundred.train(theirs, [(IDX, IDX)] * 3, steps=3, lr=1e-3)
    optimizer = torch.optim.AdamW(lora.trainable_parameters(ours), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        ours(IDX, IDX).backward()
        optimizer.step()
    torch.testing.assert_close(theirs(IDX), ours(IDX), **CLOSE)


def test_merged_weights_are_the_librarys_to_the_bit_and_come_off(hundred):
    ours, theirs = both(hundred)
    before = theirs(IDX)
    hundred.merge(theirs)
    lora.merge(ours)
    for path, layer in hundred.updates(theirs).items():
        assert raw(layer.merged) == raw(ours.get_submodule(path).weight)
    torch.testing.assert_close(theirs(IDX), ours(IDX), **CLOSE)
    hundred.unmerge(theirs)
    assert torch.equal(theirs(IDX), before)


def test_its_file_is_the_librarys(hundred, tmp_path):
    ours, theirs = both(hundred)
    hundred.save(theirs, tmp_path / "theirs", r=4, alpha=6)
    lora.save(ours, tmp_path / "ours")
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("theirs", "ours")]
    tensors = [{key: raw(t) for key, t in load_file(file).items()} for file in files]
    assert tensors[0] == tensors[1]
    configs = [file.with_name("adapter_config.json").read_text() for file in files]
    config, wanted = map(json.loads, configs)
    assert config == {key: wanted[key] for key in config}
    fresh = tiny_gpt2()
    lora.load(fresh, tmp_path / "theirs")
    torch.testing.assert_close(fresh(IDX), theirs(IDX), **CLOSE)
