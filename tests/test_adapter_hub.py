"""Adapters from the Hub, against a server on this machine that answers as the Hub does."""

from __future__ import annotations

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
from lora.disk.checkpoint import CONFIG, WEIGHTS
from tests.folders import contents, refuses
from tests.hub import hub
from tests.toys import IDX, tiny_gpt2

__all__ = ["hub"]  # the fixture: a running Hub
FILES = [CONFIG, WEIGHTS]


def test_an_adapter_is_downloaded_once_and_then_needs_no_hub(hub, saved):
    folder, want = saved
    hub.repos["org/adapter"] = contents(folder) | {"README.md": b"mine", "adapter_model.bin": b"x"}
    model = tiny_gpt2()
    lora.load(model, "org/adapter")
    assert torch.equal(model(IDX), want)
    fetched = [file for method, file in hub.requests if method == "GET"]
    assert fetched == [CONFIG, WEIGHTS]
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


@pytest.mark.parametrize(
    ("repository", "kept", "error", "words"),
    [
        ("org/none", FILES, RepositoryNotFoundError, "Repository Not Found for url: .*org/none"),
        ("org/old", [WEIGHTS], EntryNotFoundError, f"Entry Not Found for url: .*org/old.*{CONFIG}"),
        ("org/old", [CONFIG], EntryNotFoundError, f"Entry Not Found for url: .*org/old.*{WEIGHTS}"),
        ("stopped", FILES, LocalEntryNotFoundError, "cannot find the .* in the (local|disk) cache"),
        ("offline", FILES, LocalEntryNotFoundError, "cannot find the .* in the (local|disk) cache"),
    ],
)
def test_what_is_not_there_is_said_as_the_hub_says_it(
    hub, saved, monkeypatch, repository, kept, error, words
):
    files = {name: data for name, data in contents(saved[0]).items() if name in kept}
    hub.repos["org/old"] = files | {"adapter_model.bin": b"pickle"}
    if repository == "stopped":
        hub.stop()
    if repository == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    name = repository if "/" in repository else "org/old"
    refuses(tiny_gpt2(), name, words, error)
    assert not any(file.endswith(".bin") for _, file in hub.requests)
