"""A population: each adapter ends as if it had been alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import gpt2
import lora
from gpt2.training.population import PopulationTraining
from tests.toys import TINY

STEPS = 30


def base(dtype: torch.dtype = torch.float64, dropout: float = 0.1) -> gpt2.GPT2:
    from dataclasses import replace

    with torch.random.fork_rng():
        torch.manual_seed(0)
        rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)
        model = gpt2.GPT2(replace(TINY, **rates)).to(dtype)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape) * 0.3)
    return model.eval()


def data(n: int = 7) -> gpt2.Dataset:
    random = np.random.default_rng(1)
    lengths = random.integers(4, 13, n)
    ids = random.integers(0, TINY.vocab_size, int(lengths.sum()), np.int32)
    return gpt2.Dataset(ids, np.cumsum(lengths), random.integers(0, 3, n).astype(np.int32))


ROOM = lora.LoRAConfig(r=4, targets=("c_attn", "mlp.c_fc", "c_proj"), dropout=0.1)
ADAPTERS = [
    lora.LoRAConfig(r=2, alpha=4, dropout=0.2, targets=("c_attn",), seed=3),
    lora.LoRAConfig(r=4, alpha=16, targets=("attn.c_proj", "c_fc"), seed=4),
    lora.LoRAConfig(r=1, alpha=1, dropout=0.1, targets=("c_attn", "c_fc", "c_proj"), seed=5),
    lora.LoRAConfig(r=3, alpha=8, dropout=0.3, rslora=True, targets=("c_attn",), layers=[1]),
]
CONFIGS = [
    gpt2.TrainConfig(steps=STEPS, batch_size=2, lr=1e-2, seed=1, weight_decay=0.1),
    gpt2.TrainConfig(steps=STEPS, batch_size=2, lr=3e-3, seed=2, schedule="cosine", clip=0.05),
    gpt2.TrainConfig(
        epochs=8, batch_size=2, lr=2e-2, seed=3, accumulate=3, warmup_ratio=0.2, clip=None
    ),
    gpt2.TrainConfig(steps=STEPS, batch_size=2, lr=1e-3, seed=1, schedule="constant"),
]
RATIOS = [1.0, 4.0, 16.0, 1.0]


def alone(i: int, dtype: torch.dtype) -> tuple[list[float], dict[str, Tensor]]:
    model = base(dtype)
    adapter = ADAPTERS[i]
    if adapter.seed is None:
        adapter = lora.LoRAConfig(**{**vars(adapter), "seed": 9})
    lora.inject(model, adapter)
    groups = lora.parameter_groups(model, CONFIGS[i].lr, b_ratio=RATIOS[i])
    records = list(gpt2.train(model, data(), CONFIGS[i], groups=groups))
    factors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return [record.loss for record in records], factors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_each_ends_as_if_it_had_been_alone(dtype):
    model = base(dtype)
    slots = lora.Population(model, 4, ROOM)
    training = PopulationTraining(model, slots, data(), CONFIGS[0])
    for i, (adapter, config) in enumerate(zip(ADAPTERS, CONFIGS, strict=True)):
        if adapter.seed is None:
            adapter = lora.LoRAConfig(**{**vars(adapter), "seed": 9})
        slots.draw(i, adapter)
        training.start(i, config, ratios={"B": RATIOS[i]})
    while training.advance(7):
        pass
    for i in range(4):
        losses, factors = alone(i, dtype)
        own = training.trainings[i]
        near = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
        got = torch.tensor([r.loss for r in own.records])
        torch.testing.assert_close(got, torch.tensor(losses), rtol=1e-5, atol=0)
        updates = slots.take(i)
        for name, want in factors.items():
            path, _, factor = name.replace(".updates.default", "").rpartition(".")
            torch.testing.assert_close(getattr(updates[path], factor).detach(), want, **near)
