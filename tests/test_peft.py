"""PEFT as the oracle: adapters go back and forth between it and us with equal logits."""

from __future__ import annotations

import json

import pytest
import torch

import lora
from tests.folders import peft_model
from tests.toys import IDX, TINY, randomize, tiny_gpt2, twin

peft = pytest.importorskip("peft", reason="PEFT is the oracle here")
transformers = pytest.importorskip("transformers", reason="PEFT adapts its models")

ALL = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


@pytest.mark.parametrize("targets", [["c_attn"], ALL, ["attn.c_proj"]])
def test_ours_to_peft(tmp_path, targets):
    model = tiny_gpt2()
    lora.inject(model, r=4, alpha=6, targets=targets)
    randomize(model)
    want = model(IDX)
    lora.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(twin(tiny_gpt2()), tmp_path)
    torch.testing.assert_close(theirs(IDX).logits, want, rtol=1e-5, atol=1e-5)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(merged(IDX).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": ALL, "lora_dropout": 0.1},
        {"use_rslora": True},
        {"target_modules": r".*\.h\.1\.attn\.c_(attn|proj)"},
        {"target_modules": ALL, "exclude_modules": ["mlp.c_proj"]},
        {"layers_to_transform": [1]},
        {"target_modules": ALL, "rank_pattern": {"c_fc": 2}, "alpha_pattern": {"h.0.mlp.c_fc": 3}},
    ],
)
def test_peft_to_ours_and_back(tmp_path, fields):
    theirs = peft_model(tiny_gpt2(), **fields).eval()
    want = theirs(IDX).logits
    theirs.save_pretrained(tmp_path / "theirs")
    model = tiny_gpt2()
    lora.load(model, tmp_path / "theirs")
    torch.testing.assert_close(model(IDX), want, rtol=1e-5, atol=1e-5)
    lora.save(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(twin(tiny_gpt2()), tmp_path / "ours")
    torch.testing.assert_close(again(IDX).logits, want, rtol=1e-5, atol=1e-5)


def test_peft_reads_our_config_without_a_warning(tmp_path, recwarn):
    model = tiny_gpt2()
    lora.inject(model, r=4)
    lora.save(model, tmp_path)
    recwarn.clear()
    peft.PeftModel.from_pretrained(twin(tiny_gpt2()), tmp_path)
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    known = set(peft.LoraConfig.__dataclass_fields__)
    assert set(fields) <= known


def test_our_loader_works_on_transformers_model(tmp_path):
    theirs = peft_model(tiny_gpt2()).eval()
    want = theirs(IDX).logits
    theirs.save_pretrained(tmp_path)
    plain = twin(tiny_gpt2())
    lora.load(plain, tmp_path)
    torch.testing.assert_close(plain(IDX).logits, want, rtol=1e-5, atol=1e-5)


def test_the_update_has_pefts_gradients():
    ours = tiny_gpt2()
    theirs = peft_model(ours)
    lora.inject(ours, r=4, alpha=6)
    with torch.no_grad():
        for i in range(TINY.n_layer):
            layer = theirs.base_model.model.transformer.h[i].attn.c_attn
            update = ours.transformer.h[i].attn.c_attn.updates["default"]
            update.A.copy_(layer.lora_A["default"].weight)
            update.B.copy_(layer.lora_B["default"].weight)
    theirs.eval()
    labels = torch.nn.functional.pad(IDX[:, 1:], (0, 1), value=-100)
    theirs(IDX, labels=IDX).loss.backward()
    loss = torch.nn.functional.cross_entropy(ours(IDX).flatten(0, 1), labels.flatten())
    loss.backward()
    for i in range(TINY.n_layer):
        layer = theirs.base_model.model.transformer.h[i].attn.c_attn
        update = ours.transformer.h[i].attn.c_attn.updates["default"]
        for got, want in (
            (update.A.grad, layer.lora_A["default"].weight.grad),
            (update.B.grad, layer.lora_B["default"].weight.grad),
        ):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
