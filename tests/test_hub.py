"""The Hub path, against a server on this machine that answers as the Hub does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from gpt2.config import GPT2Config
from gpt2.model import GPT2
from tests.hub import hub

__all__ = ["hub"]  # the fixture: a running Hub

ROOT = Path(__file__).parent.parent


@pytest.fixture
def files(tmp_path) -> dict[str, bytes]:
    """The two files of a small GPT-2."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=128, block_size=8, vocab_size=50)
    GPT2(config).save_pretrained(tmp_path / "made")
    return {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()}


def weights(model: GPT2) -> list:
    return [p.sum().item() for p in model.parameters()]


@pytest.mark.parametrize("how", ["stopped", "offline"])
def test_downloads_once_and_then_needs_no_hub(hub, files, monkeypatch, how):
    hub.repos["org/small"] = files | {"pytorch_model.bin": b"pickle", "model.onnx": b"graph"}
    first = GPT2.from_pretrained("org/small")
    got = sorted(file for method, file in hub.requests if method == "GET")
    assert got == ["config.json", "model.safetensors"]
    hub.requests.clear()
    if how == "stopped":
        hub.stop()
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert weights(GPT2.from_pretrained("org/small")) == weights(first)
    assert not hub.requests


def test_published_names_mean_the_hub_even_beside_a_folder_of_that_name(
    hub, files, tmp_path, monkeypatch
):
    hub.repos["openai-community/gpt2"] = files
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert GPT2.from_pretrained("gpt2").config.n_embd == 128
    with pytest.raises(FileNotFoundError, match=r"\./gpt2 lacks config.json; model.safetensors\."):
        GPT2.from_pretrained("./gpt2")


def test_sharded_here_on_the_hub_and_from_the_cache(hub, files, tmp_path):
    tensors = load_file(tmp_path / "made" / "model.safetensors")
    shards = {f"model-{i}.safetensors": dict(list(tensors.items())[i::3]) for i in range(3)}
    weight_map = {key: name for name, shard in shards.items() for key in shard}
    (tmp_path / "config.json").write_bytes(files["config.json"])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, shard in shards.items():
        save_file(shard, tmp_path / name)
    hub.repos["org/sharded"] = {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}
    whole = weights(GPT2.from_pretrained(tmp_path / "made"))
    assert weights(GPT2.from_pretrained(tmp_path)) == whole
    assert weights(GPT2.from_pretrained("org/sharded")) == whole
    hub.stop()
    assert weights(GPT2.from_pretrained("org/sharded")) == whole
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-2\.safetensors"):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.parametrize("how", ["local", "hub"])
@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd"])
def test_shards_of_another_folder_are_not_read(hub, files, tmp_path, how, shard):
    folder = tmp_path / "made"
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"weight_map": {"wte.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.repos["org/evil"] = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(FileNotFoundError, match="made lacks|evil lacks"):
        GPT2.from_pretrained(folder if how == "local" else "org/evil")


@pytest.mark.parametrize("how", ["stopped", "offline"])
def test_out_of_reach(hub, files, monkeypatch, how):
    hub.repos["openai-community/gpt2"] = files
    if how == "stopped":
        hub.stop()
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError) as caught:
        GPT2.from_pretrained("gpt2")
    assert str(caught.value) == (
        "openai-community/gpt2: the Hub is out of reach and the files are not in the cache at "
        f"{hub.cache}. Pass the path of a local copy, or 'demo'."
    )
    assert caught.value.__suppress_context__


def test_what_the_hub_does_not_have(hub, files):
    hub.repos["org/old"] = {"config.json": files["config.json"], "pytorch_model.bin": b"pickle"}
    with pytest.raises(FileNotFoundError, match="org/old lacks model.safetensors"):
        GPT2.from_pretrained("org/old")
    with pytest.raises(FileNotFoundError, match=r"'org/none' here, and no repo.*127\.0\.0\.1"):
        GPT2.from_pretrained("org/none")
    assert not any(file.endswith(".bin") for _, file in hub.requests)


def test_huggingface_hub_is_imported_only_when_it_is_needed():
    program = """
import sys
from gpt2.model import GPT2
GPT2.from_pretrained("demo")
assert "huggingface_hub" not in sys.modules
assert "torch._dynamo" not in sys.modules  # drawing on the meta device would cost a second
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
