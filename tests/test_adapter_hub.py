"""Adapters from the Hub, against a server on this machine that answers as the Hub does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

import lora
from lora.disk import checkpoint
from tests.folders import contents, refuses
from tests.hub import hub
from tests.toys import IDX, tiny_gpt2

__all__ = ["hub"]  # the fixture: a running Hub
ROOT = Path(__file__).parent.parent


def test_an_adapter_is_downloaded_once_and_then_needs_no_hub(hub, saved):
    folder, want = saved
    hub.repos["org/adapter"] = contents(folder) | {"README.md": b"mine", "adapter_model.bin": b"x"}
    model = tiny_gpt2()
    lora.load(model, "org/adapter")
    assert torch.equal(model(IDX), want)
    fetched = [file for method, file in hub.requests if method == "GET"]
    assert fetched == [checkpoint.CONFIG, checkpoint.WEIGHTS]
    hub.stop()
    again = tiny_gpt2()
    lora.load(again, "org/adapter", trainable=False)
    assert torch.equal(again(IDX), want)
    assert lora.algebra.read("org/adapter").keys() == lora.adapters(model)["default"].keys()


def test_a_folder_here_comes_first_and_a_path_never_means_the_hub(
    hub, saved, tmp_path, monkeypatch
):
    folder, want = saved
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    folder.rename(tmp_path / "org" / "adapter")
    hub.repos["org/adapter"] = {}
    model = tiny_gpt2()
    lora.load(model, "org/adapter")
    assert torch.equal(model(IDX), want)
    for path in (Path("org/none"), "./org/none"):
        words = r"has no .* no adapter_model\.safetensors"
        refuses(tiny_gpt2(), path, words, FileNotFoundError)
    assert not hub.requests


def test_an_unknown_repository_is_said_as_the_hub_says_it(hub):
    words = r"Repository Not Found for url: .*org/none"
    refuses(tiny_gpt2(), "org/none", words, RepositoryNotFoundError)


@pytest.mark.parametrize("missing", [checkpoint.CONFIG, checkpoint.WEIGHTS])
def test_a_repository_without_an_adapter(hub, saved, missing):
    folder, _ = saved
    kept = {name: data for name, data in contents(folder).items() if name != missing}
    hub.repos["org/old"] = kept | {"adapter_model.bin": b"pickle"}
    words = rf"Entry Not Found for url: .*org/old.*{missing}"
    refuses(tiny_gpt2(), "org/old", words, EntryNotFoundError)
    assert not any(file.endswith(".bin") for _, file in hub.requests)


@pytest.mark.parametrize("how", ["stopped", "offline"])
def test_out_of_reach(hub, saved, monkeypatch, how):
    hub.repos["org/adapter"] = contents(saved[0])
    if how == "stopped":
        hub.stop()
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    words = r"cannot find the .* in the (local|disk) cache"
    refuses(tiny_gpt2(), "org/adapter", words, LocalEntryNotFoundError)


def test_the_hub_is_imported_only_when_it_is_needed(saved):
    program = f"""
import sys
import lora
from tests.toys import tiny_gpt2
lora.load(tiny_gpt2(), {str(saved[0])!r})
assert "huggingface_hub" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
