"""Training against PEFT and transformers: the same adapter, data and arithmetic, step by step."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from itertools import islice

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gpt2
import lora
from gpt2 import Batch, Dataset, StepRecord, TrainConfig, batches, encode, train
from tests.toys import TEXTS

peft, transformers = map(pytest.importorskip, ("peft", "transformers"))

NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
CONFIG = TrainConfig(lr=3e-3, steps=20, schedule="linear", clip=1.0)


@pytest.fixture(scope="module")
def data(tokenizer) -> Dataset:
    return encode(TEXTS, tokenizer)


@pytest.fixture
def ours(demo) -> gpt2.GPT2:
    """The demo base with a new adapter and no dropout."""
    model = gpt2.GPT2(replace(demo.config, **NO_DROPOUT))
    model.load_state_dict(demo.state_dict())
    lora.inject(model, r=8, alpha=16, targets=["c_attn"], seed=0)
    return model


def theirs_of(ours: gpt2.GPT2) -> nn.Module:
    """PEFT's model of the same base, with the same A and B."""
    folder = str(files("gpt2") / "assets" / "demo")
    base = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, **NO_DROPOUT)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=["c_attn"],
        fan_in_fan_out=True,
    )
    theirs = peft.get_peft_model(base, settings)
    tensors = dict(theirs.named_parameters())
    with torch.no_grad():
        for path, module in ours.named_modules():
            if isinstance(module, lora.LoRALinear):
                update = module.updates["default"]
                tensors[f"base_model.model.{path}.lora_A.default.weight"].copy_(update.A)
                tensors[f"base_model.model.{path}.lora_B.default.weight"].copy_(update.B)
    return theirs


def in_order(data: Dataset) -> list[Batch]:
    """The batch of each step."""
    epochs = (batches(data, 1, seed=CONFIG.seed, epoch=epoch) for epoch in range(CONFIG.steps))
    return list(islice((batch for epoch in epochs for batch in epoch), CONFIG.steps))


def loss_of(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """In float64: over 50,257 logits torch's float32 cross-entropy can be off by 1e-5 itself."""
    wanted = batch.labels[:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), wanted)


def their_steps(model: nn.Module, data: Dataset) -> list[tuple[float, float, float]]:
    """Loss, gradient norm and learning rate of each step of the usual loop."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=CONFIG.lr, weight_decay=CONFIG.weight_decay)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, CONFIG.steps)
    figures: list[tuple[float, float, float]] = []
    for batch in in_order(data):
        loss = loss_of(model(input_ids=batch.idx).logits, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, CONFIG.clip)
        figures.append((loss.item(), norm.item(), schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return figures


def test_twenty_steps_are_pefts(ours, data):
    want = their_steps(theirs_of(ours), data)
    records: list[StepRecord] = list(train(ours, data, CONFIG))
    assert [r.step for r in records] == list(range(1, 21))
    for record, (loss, norm, lr) in zip(records, want, strict=True):
        assert record.loss == pytest.approx(loss, rel=0, abs=1e-5)
        assert record.grad_norm == pytest.approx(norm, rel=1e-4)
        assert record.lr == pytest.approx(lr, rel=1e-12)
    assert records[-1].loss < 0.5 * records[0].loss  # enough has happened to tell loops apart
