import itertools
import json
import logging
import os
import re
import struct
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from gpt2 import files, pretrained
from gpt2.config import GPT2Config
from gpt2.generation import generate
from gpt2.model import GPT2
from gpt2.sampling import GenerateConfig

DEMO = Path(__file__).parent.parent / "gpt2" / "assets" / "demo"
TINY = GPT2Config(n_layer=2, n_head=2, n_embd=128, block_size=16, vocab_size=50, attn_pdrop=0.25)


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="compares with transformers (extra: peers)")


@pytest.fixture
def tiny() -> GPT2:
    torch.manual_seed(0)
    return GPT2(TINY).eval()


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A folder as published: config.json, and tensors without the `transformer.` prefix."""
    tiny.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def rewrite(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(change(tensors), file)


def reconfigure(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_demo_base_is_what_an_independent_implementation_computes(
    demo, tokenizer, demo_expected
):
    expected = demo_expected
    ids = tokenizer.encode((DEMO / "sample.txt").read_text())[: expected["sample_tokens"]]
    with torch.no_grad():
        logits = demo(torch.tensor([ids]))[0]
        mean_loss = F.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:])).item()
        top = demo(torch.tensor([tokenizer.encode("In the beginning")]))[0, -1].topk(5)
    # Theirs is a float32 mean over 1,023 tokens.
    assert mean_loss == pytest.approx(expected["sample_mean_nats_per_token"], abs=1e-5)
    assert top.indices.tolist() == [i for i, _ in expected["in_the_beginning_top5"]]
    assert top.values.tolist() == pytest.approx(
        [logit for _, logit in expected["in_the_beginning_top5"]], abs=5e-5
    )


def test_what_comes_back(demo):
    assert not any(module.training for module in demo.modules())
    assert demo.lm_head.weight is demo.transformer.wte.weight
    for p in demo.parameters():
        assert (p.requires_grad, p.is_leaf, p.is_contiguous()) == (True, True, True)
        assert p.dtype == torch.float32
    dry = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}  # as it was pretrained
    assert demo.config == GPT2Config(n_layer=8, n_head=4, n_embd=256, **dry)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float64"])
def test_dtype(demo, name):
    dtype = getattr(torch, name)
    expected = demo.transformer.h[3].mlp.c_fc.weight.to(dtype)
    for given in (dtype, name):
        model = GPT2.from_pretrained("demo", dtype=given, device="cpu")
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert torch.equal(model.transformer.h[3].mlp.c_fc.weight, expected)


@pytest.mark.parametrize(
    "dtype", ["auto", "int8", torch.int8, torch.complex64, torch.float8_e4m3fn]
)
def test_a_dtype_that_is_not_for_weights(dtype):
    with pytest.raises(ValueError, match=rf"floating-point, got {dtype}"):
        GPT2.from_pretrained("demo", dtype=dtype)


def test_all_layouts_load_alike(tiny, folder):
    """With transformers' prefix, with the masks of old files, with the head once more; one is
    refused whose head differs. Other entries of a config do no harm."""
    assert same_weights(GPT2.from_pretrained(folder), tiny)
    assert GPT2.from_pretrained(folder).config == TINY
    rewrite(folder, lambda t: {f"transformer.{k}": v for k, v in t.items()})
    reconfigure(folder, n_inner=512, activation_function="gelu_pytorch_tanh", n_ctx=16, anything=1)
    assert same_weights(GPT2.from_pretrained(folder), tiny)
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(2)}
    masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    head = "transformer.wte.weight"
    rewrite(folder, lambda t: t | masks | {"lm_head.weight": t[head].clone()})
    assert same_weights(GPT2.from_pretrained(folder), tiny)
    rewrite(folder, lambda t: t | {"lm_head.weight": t[head] + 1})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        GPT2.from_pretrained(folder)


def test_one_file_with_the_config_beside_it(tiny, folder):
    file = (folder / "model.safetensors").rename(folder / "anything.safetensors")
    model = GPT2.from_pretrained(file)
    assert same_weights(model, tiny)
    assert model.config == TINY


def test_all_faults_in_one_error(folder):
    def change(tensors):
        del tensors["h.1.ln_2.bias"], tensors["wpe.weight"]
        tensors["h.0.attn.c_attn.weight"] = tensors["h.0.attn.c_attn.weight"].t().contiguous()
        return tensors | {"h.20000.ln_1.weight": torch.zeros(2)}

    rewrite(folder, change)
    reconfigure(folder, vocab_size=51)
    with pytest.raises(ValueError, match="does not hold a GPT-2") as caught:
        GPT2.from_pretrained(folder)
    for fault in (
        "transformer.wte.weight is (50, 128), should be (51, 128)",
        "transformer.h.1.ln_2.bias is missing",
        "transformer.wpe.weight is missing",
        "transformer.h.0.attn.c_attn.weight is (384, 128), should be (128, 384)",
        "transformer.h.20000.ln_1.weight is left over",
    ):
        assert fault in str(caught.value)
    assert len(str(caught.value)) < 2_000


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "relu"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"tie_word_embeddings": False},
        {"n_inner": 100},
        {"model_type": "llama"},
    ],
)
def test_another_architecture(folder, change):
    reconfigure(folder, **change)
    [(key, value)] = change.items()
    with pytest.raises(ValueError, match=re.escape(f"{key} {value!r} (supported: ")):
        GPT2.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('{"n_head": 5, "n_embd": 128}', "n_head 5 must divide n_embd 128"),
        ('{"n_head": 2, "attn_pdrop": "much"}', r"attn_pdrop must be in \[0, 1\), got 'much'"),
        ('{"n_head": 2, "layer_norm_epsilon": NaN}', r"epsilon must be in \(0, inf\), got nan"),
        ('{"n_head": 2, "model_type": "' + "x" * 10**6 + '"}', "model_type 'xxx"),
    ],
    ids=range(5),
)
def test_a_broken_config(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        GPT2.from_pretrained(folder)
    assert len(str(caught.value)) < 2_000
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"base lacks config\.json\."):
        GPT2.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_damaged_file(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or no safetensors file"):
        GPT2.from_pretrained(folder)


def test_a_pickle_is_never_read(folder):
    file = folder / "pytorch_model.bin"
    torch.save({"wte.weight": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged or no safetensors file"):
        GPT2.from_pretrained(file)
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"Only safetensors are read: convert.*pytorch_model\.bin"
    ):
        GPT2.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"'no/such/place'.*gpt2-xl, demo, a folder"):
        GPT2.from_pretrained("no/such/place")


def test_training_the_base_never_writes_to_the_file(folder):
    before = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        for p in GPT2.from_pretrained(folder).parameters():
            p.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before


def test_saving_over_the_file_that_is_mapped(folder):
    model = GPT2.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.ln_f.bias.add_(1)
    expected = deepcopy(model)
    model.save_pretrained(folder)
    assert same_weights(model, expected)
    assert same_weights(GPT2.from_pretrained(folder), expected)


def write_zeros_of_124m(file: Path) -> int:
    """A file of the published 124M's names and sizes (masks too), without writing its zeros."""
    file.with_name("config.json").write_text("{}")
    header, end = {}, 0
    names = {k: v.shape for k, v in pretrained._unfilled(GPT2, GPT2Config()).state_dict().items()}
    masks = {f"h.{i}.attn.bias": (1, 1, 1024, 1024) for i in range(12)}
    for name, shape in (names | masks).items():
        if name != "lm_head.weight":
            start, end = end, end + 4 * torch.Size(shape).numel()
            name = name.removeprefix("transformer.")
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (3 - len(text) % 4)  # not aligned to a float, as the published file is not
    with file.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + end)
    with file.open("rb") as f:  # into the page cache: the speed of the disk is not what is tested
        while f.read(1 << 24):
            pass
    return file.stat().st_size


def test_124m_opens_fast_and_only_once_in_memory(tmp_path):
    size = write_zeros_of_124m(tmp_path / "model.safetensors")
    program = """
import resource, sys, time
import torch
from gpt2.model import GPT2
import gpt2.pretrained
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
start = time.perf_counter()
model = GPT2.from_pretrained(sys.argv[1])
seconds = time.perf_counter() - start
total = sum(p.sum().item() for p in model.parameters())  # touches every page
print(seconds, peak() - before, total)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    seconds, memory, total = map(float, done.stdout.split())
    assert total == 0
    assert seconds < 0.5
    assert memory < 1.2 * size


@pytest.mark.parametrize("how", [{"mmap": False}, {"dtype": torch.float64}])
def test_a_copy_does_not_care_what_becomes_of_the_file(folder, how):
    model = GPT2.from_pretrained(folder, **how)
    expected = deepcopy(model)
    file = folder / "model.safetensors"
    with file.open("r+b") as f:  # as `cp` does: the same file, other bytes
        f.seek(4096)
        f.write(b"\x01" * (file.stat().st_size - 4096))
    assert same_weights(model, expected)
    os.truncate(file, 100)  # whoever reads a mapped file now is ended by the system
    assert same_weights(model, expected)


def test_dropout_overrides_all_three(tiny, folder):
    model = GPT2.from_pretrained(folder, dropout=0.0)
    assert model.config == replace(TINY, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    idx = torch.arange(9)[None]
    assert torch.equal(model.train()(idx), tiny(idx))
    assert GPT2.from_pretrained(folder, dropout=0.3).transformer.h[1].mlp.dropout.p == 0.3
    with pytest.raises(ValueError, match=r"attn_pdrop must be in \[0, 1\), got 1"):
        GPT2.from_pretrained(folder, dropout=1)


def test_a_default_dtype_or_device_changes_nothing(tiny, folder):
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            model = GPT2.from_pretrained(folder)
            model.save_pretrained(folder / "again")
    finally:
        torch.set_default_dtype(torch.float32)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}
    assert same_weights(model, tiny)
    assert same_weights(GPT2.from_pretrained(folder / "again"), tiny)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("how", [{"mmap": False}, {"dtype": torch.bfloat16}])
def test_weights_that_are_not_finite_are_found_where_they_are_read(folder, value, how):
    def change(tensors):
        tensors["h.1.ln_2.bias"][3] = value
        return tensors

    rewrite(folder, change)
    with pytest.raises(ValueError, match=r"not finite as .*: transformer\.h\.1\.ln_2\.bias\."):
        GPT2.from_pretrained(folder, **how)
    model = GPT2.from_pretrained(folder)  # a mapped file is not read at all
    with pytest.raises(RuntimeError, match="logits are not finite"):
        generate(model, [[1]], GenerateConfig(max_new_tokens=3))
    rewrite(folder, lambda t: t | {"h.1.ln_2.bias": torch.full((128,), 1e6)})
    with pytest.raises(ValueError, match=r"as torch\.float16: transformer\.h\.1\.ln_2\.bias"):
        GPT2.from_pretrained(folder, dtype=torch.float16)
    GPT2.from_pretrained(folder, **how)


def test_tensors_are_saved_under_the_published_names(tiny, tmp_path):
    """Which mlx-lm asks for, and which transformers reads as it reads its own."""
    tiny.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {"wte.weight", "h.1.attn.c_attn.weight", "ln_f.bias"} <= names
    assert not [name for name in names if name.startswith("transformer.") or "lm_head" in name]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_what_is_saved(transformers, demo, tmp_path, caplog, recwarn, dtype):
    model = deepcopy(demo).to(dtype)
    model.save_pretrained(tmp_path)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    logger.removeHandler(caplog.handler)
    assert not [r for r in caplog.records if r.name.startswith("transformers")]
    assert not recwarn.list
    assert not any(info.values())
    assert theirs.dtype == dtype
    assert same_weights(theirs, model)
    idx = torch.arange(1000, 1040)[None]
    torch.testing.assert_close(theirs.float()(idx).logits, model.float()(idx), rtol=1e-5, atol=5e-5)


def test_saving_keeps_everything_and_gives_the_same_bytes(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "a")
    again = GPT2.from_pretrained(tmp_path / "a")
    assert again.config == TINY
    assert same_weights(again, tiny)
    again.save_pretrained(tmp_path / "b")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(os.listdir(tmp_path / "b")) == ["config.json", "model.safetensors"]
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}  # older releases of transformers want it
    stated = json.loads((tmp_path / "a" / "config.json").read_text())
    assert list(stated) == sorted(stated)


def test_files_get_the_modes_that_the_umask_says(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "made")
    (tmp_path / "plain").touch()
    wanted = (tmp_path / "plain").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "made").iterdir()} == {wanted}


def test_only_a_plain_gpt2_is_saved(tiny, tmp_path):
    attn = tiny.transformer.h[1].attn
    attn.c_attn = nn.ModuleDict({"base": attn.c_attn})
    with pytest.raises(RuntimeError, match="no plain GPT-2") as caught:
        tiny.save_pretrained(tmp_path / "new")
    for fault in ("c_attn.weight is missing", "c_attn.base.weight is left"):
        assert f"transformer.h.1.attn.{fault}" in str(caught.value)
    attn.c_attn = attn.c_attn["base"]
    tiny.lm_head.weight = nn.Parameter(tiny.lm_head.weight + 1)
    with pytest.raises(RuntimeError, match=r"lm_head\.weight differs"):
        tiny.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("disk full")])
@pytest.mark.parametrize(
    ("where", "name", "calls"),
    [(files, "save_file", 0), (os, "fsync", 0), (os, "replace", 0), (os, "replace", 1)],
    ids=["the weights", "the disk", "the first move", "the second"],
)
def test_after_a_failed_save_the_old_files_are_there(
    where, name, calls, error, tiny, tmp_path, monkeypatch
):
    tiny.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    real, called = getattr(where, name), itertools.count()

    def fail(*given):
        if next(called) != calls:
            return real(*given)
        if name == "save_file":
            given[1].write_bytes(b"half")
        raise error

    monkeypatch.setattr(where, name, fail)
    with pytest.raises(type(error), match="disk full"):
        GPT2(replace(TINY, attn_pdrop=0.5)).save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


KILLED = """
import os, signal, sys
from dataclasses import replace
import gpt2
model = gpt2.GPT2.from_pretrained(sys.argv[1])
model = gpt2.GPT2(replace(model.config, n_head=4))
real, calls = os.replace, []
def killed(*paths):
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(paths)
    real(*paths)
os.replace = killed
model.save_pretrained(sys.argv[1])
"""


@pytest.mark.parametrize("moves", range(4))
def test_a_save_that_is_killed_leaves_no_config_beside_other_weights(tiny, tmp_path, moves):
    """Another number of heads has weights of the same shapes: nothing else would tell."""
    tiny.save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path, str(moves)], check=False)
    assert done.returncode == (-9 if moves < 3 else 0)
    old = (tmp_path / "model.safetensors").read_bytes() == weights
    assert old == (moves < 2)
    if (tmp_path / "config.json").exists():
        heads = json.loads((tmp_path / "config.json").read_text())["n_head"]
        assert heads == (TINY.n_head if old else 4)
    else:
        with pytest.raises(FileNotFoundError, match=r"lacks config\.json"):
            GPT2.from_pretrained(tmp_path)
