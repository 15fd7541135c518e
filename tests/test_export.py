"""`export.py`: an adapter in other programs' formats, whose real readers give our tokens."""

from __future__ import annotations

import importlib
import os
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import gpt2
import lora
from tests.toys import randomize, untie

SIZES = gpt2.GPT2Config(n_layer=3, n_head=4, n_embd=64, block_size=64)
FOUR = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
WRITER = pytest.mark.skipif(find_spec("gguf") is None, reason="writes GGUF (extra: export)")
ADAPTERS = {
    "plain": lora.LoRAConfig(r=8, alpha=16),
    "ranks": lora.LoRAConfig(
        r=4, alpha=6, rslora=True, targets=FOUR, rank_pattern={"h.1.attn.c_attn": 7, "c_fc": 2}
    ),
    "slices": lora.LoRAConfig(r=3, alpha=5, targets="c_attn[q,v]", layers=[1, 2]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A GPT-2 whose random weights are large enough to matter."""
    folder = tmp_path_factory.mktemp("export") / "base"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = gpt2.GPT2(SIZES)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(torch.randn(p.shape) * 0.3 + name.endswith(("ln_1.weight", "ln_f.weight")))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(base) -> Path:
    return saved_adapter(base, "plain")


@pytest.fixture(scope="module", params=ADAPTERS)
def adapter(request, base) -> Path:
    return saved_adapter(base, request.param)


def saved_adapter(base: Path, kind: str) -> Path:
    model = gpt2.GPT2.from_pretrained(base)
    lora.inject(model, ADAPTERS[kind])
    randomize(model, std=0.2)
    lora.save(model, base.parent / kind)
    return base.parent / kind


def loaded(base: Path, adapter: Path) -> gpt2.GPT2:
    model = gpt2.GPT2.from_pretrained(base)
    lora.load(model, adapter)
    return model


@pytest.mark.parametrize("form", ["gguf", "gguf-lora", "mlx", "merged"])
def test_the_program_that_reads_it_gives_our_tokens(form, adapter, script, tmp_path, capsys):
    reader = {"mlx": "mlx_lm", "merged": "transformers"}.get(form, "llama_cpp")
    if reader == "llama_cpp" and not os.environ.get("LONG"):
        pytest.skip("llama.cpp is built for minutes: LONG=1")
    pytest.importorskip(reader, exc_type=ImportError)
    out = tmp_path / "out"
    assert script("export").main([str(adapter), str(out), "--format", form, "--check=true"]) == 0
    line = r"(\d+) of (\d+) greedy tokens after 6 prompts are (\w+)'s too\.\n"
    said = re.search(line, capsys.readouterr().out)
    assert said
    assert int(said[1]) == int(said[2]) > 70  # of 144, where no tie ends a row
    assert said[3] == reader


def test_mlx_gives_our_logits(base, adapter, script, tmp_path):
    mlx = pytest.importorskip("mlx.core")
    from mlx_lm import load

    words = [str(adapter), str(tmp_path / "out"), "--format", "mlx", "--check", "false"]
    assert script("export").main(words) == 0
    ids = torch.arange(5, 25)[None]
    theirs, _ = load(str(tmp_path / "out"), adapter_path=str(tmp_path / "out" / "adapters"))
    logits = torch.from_numpy(np.array(theirs(mlx.array(ids.numpy()))))
    with torch.no_grad():
        torch.testing.assert_close(logits, loaded(base, adapter)(ids), rtol=1e-4, atol=1e-3)
        assert not torch.allclose(logits, gpt2.GPT2.from_pretrained(base)(ids), atol=0.5)


def read(file: Path):
    reader = importlib.import_module("gguf").GGUFReader(file)
    tensors = {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}
    return {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("tokenizer")
    }, tensors


# llama.cpp's names of ours.
GGUF_NAMES = {
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


@WRITER
def test_a_gguf_adapter_holds_the_same_deltas(base, adapter, script, tmp_path):
    file = tmp_path / "adapter.gguf"
    words = [str(adapter), str(file), "--format", "gguf-lora", "--check", "false"]
    assert script("export").main(words) == 0
    facts, tensors = read(file)
    assert (facts["general.type"], facts["adapter.type"]) == ("adapter", "lora")
    assert facts["general.architecture"] == "gpt2"
    alpha, values = facts["adapter.lora.alpha"], lora.algebra.read(adapter)
    assert len(tensors) == 2 * len(values)
    for path, pair in values.items():
        block, name = path.removeprefix("transformer.h.").split(".", 1)
        of = f"blk.{block}.{GGUF_NAMES[name]}.weight"
        a, b = tensors[f"{of}.lora_a"], tensors[f"{of}.lora_b"]
        scale = alpha / len(a) if alpha else 1.0  # as llama.cpp computes it
        torch.testing.assert_close(scale * b @ a, pair.delta().float())


@WRITER
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gguf_holds_the_merged_weights(dtype, base, plain, script, tmp_path):
    file = tmp_path / "model.gguf"
    words = [str(plain), str(file), "--format", "gguf", "--dtype", dtype, "--check", "false"]
    assert script("export").main(words) == 0
    facts, tensors = read(file)
    model = loaded(base, plain)
    lora.eject(model, merge=True)
    config, h = model.config, model.transformer.h
    assert facts["gpt2.block_count"] == config.n_layer
    assert facts["gpt2.attention.head_count"] == config.n_head
    assert facts["gpt2.context_length"] == config.block_size
    assert facts["gpt2.attention.layer_norm_epsilon"] == pytest.approx(config.layer_norm_epsilon)
    kept = getattr(torch, dtype)
    expected = {
        "token_embd.weight": model.transformer.wte.weight.to(kept),
        "position_embd.weight": model.transformer.wpe.weight,
        "output_norm.bias": model.transformer.ln_f.bias,
        "blk.1.attn_norm.weight": h[1].ln_1.weight,
        "blk.2.ffn_norm.bias": h[2].ln_2.bias,
    }
    for path, name in GGUF_NAMES.items():
        layer = h[2].get_submodule(path)
        expected[f"blk.2.{name}.weight"] = layer.weight.T.to(kept)
        expected[f"blk.2.{name}.bias"] = layer.bias
    assert len(tensors) == 4 + 12 * config.n_layer
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name
    if dtype == "float32":
        check_tokenizer(file)


def check_tokenizer(file: Path) -> None:
    fields = importlib.import_module("gguf").GGUFReader(file).fields
    facts = {name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges")}
    end = fields["tokenizer.ggml.eos_token_id"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    tokens, tokenizer = facts["tokens"], gpt2.Tokenizer()
    assert (len(tokens), tokens[end], end) == (50257, "<|endoftext|>", tokenizer.eos)
    assert [tokens[i] for i in tokenizer.encode("Hello world")] == ["Hello", "Ġworld"]
    assert facts["merges"][:2] == ["Ġ t", "Ġ a"]
    assert [i for i, kind in enumerate(types) if kind != 1] == [end]


@WRITER
def test_answers_that_differ_end_with_an_error(plain, script, tmp_path, monkeypatch, capsys):
    """And the share of float16's, which are rounded, is printed."""
    export = script("export")
    real = export.exports.answers
    monkeypatch.setitem(export.exports.READERS, "gguf", "torch")  # a program that is installed

    def changed(form, model, out, ids):
        rows = real("merged", model, tmp_path / "merged", ids)
        rows[2][3] += 1
        return rows

    pytest.importorskip("transformers")
    assert export.main([str(plain), str(tmp_path / "merged"), "--format", "merged"]) == 0
    monkeypatch.setattr(export.exports, "answers", changed)
    capsys.readouterr()
    assert export.main([str(plain), str(tmp_path / "one.gguf"), "--format", "gguf"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"Only (\d+) of 1\d\d greedy tokens", error)
    assert "the first that differs: 'Q: What do machine learning models do?" in error
    words = [str(plain), str(tmp_path / "two.gguf"), "--format", "gguf", "--dtype", "float16"]
    assert export.main(words) == 0
    assert "greedy tokens after 6 prompts" in capsys.readouterr().out


def test_tokens_are_compared_up_to_a_tie(script):
    agreement = script("runs.exports").agreement
    ours, sure, tie = [[1, 2, 3], [4, 5]], [1.0] * 4, [1.0, 0.001, 1.0, 1.0]
    assert agreement(ours, ours, [sure, sure]) == (5, 5, None)
    assert agreement(ours, [[1, 2, 3], [4, 6]], [sure, sure]) == (4, 5, 1)
    assert agreement(ours, [[1, 9, 9], [4, 5]], [sure, sure]) == (3, 5, 0)
    assert agreement(ours, [[1, 9, 9], [4, 5]], [tie, sure]) == (3, 3, None)
    assert agreement(ours, [[1, 2, 3, 7], [4]], [sure, sure]) == (4, 6, 0)  # one ends before


def test_a_run_is_compared_on_its_own_prompts(script, tmp_path):
    prompts = script("export").prompts
    (tmp_path / "run.json").write_text('{"answers": [{"prompt": "a"}, {"prompt": "b"}]}')
    assert prompts(tmp_path) == ["a", "b"]
    assert len(prompts(tmp_path / "adapter")) == 6


@WRITER
@pytest.mark.parametrize("form", ["gguf-lora", "mlx"])
def test_an_adapter_that_the_format_cannot_hold_is_one_line(form, base, script, tmp_path, capsys):
    for name, config in {
        "wte": lora.LoRAConfig(targets=["wte", "c_attn"]),
        "ln_f": lora.LoRAConfig(modules_to_save=["ln_f"]),
    }.items():
        model = gpt2.GPT2.from_pretrained(base)
        untie(model.lm_head)
        lora.inject(model, config)
        folder, out = tmp_path / name, tmp_path / "out"
        lora.save(model, folder)
        assert script("export").main([str(folder), str(out), "--format", form]) == 2
        error = capsys.readouterr().err
        assert name in error
        assert error.count("\n") == 1
        assert not out.exists()


def test_what_cannot_be_written_or_read_is_told_before_the_work(
    plain, script, tmp_path, monkeypatch, capsys
):
    export = script("export")
    (tmp_path / "old").write_text("mine")
    assert export.main([str(plain), str(tmp_path / "old"), "--format", "gguf"]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    words = [str(plain), str(tmp_path / "new"), "--format", "gguf", "--check", "true"]
    assert export.main(words) == 2
    assert "gguf and llama_cpp" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
