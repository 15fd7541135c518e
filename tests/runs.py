"""A tiny model, data and a run, which the tests of training share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from hashlib import blake2b
from itertools import islice

import torch
from torch import nn

import gpt2
import lora
from tests.toys import TINY, raw, tiny_gpt2

STILL = replace(TINY, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)


class Letters:
    """A tokenizer of one id a letter."""

    eos = 60

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]


def encoded(texts: str) -> gpt2.Dataset:
    """The words as examples."""
    return gpt2.encode(texts.split(), Letters())


DATA = encoded("abc hello lowrank at updates beside weights x")
HELD_OUT = encoded("abd hallo lowtank as")


def model_of(dropout: bool = False, adapter: bool = False, seed: int = 0) -> gpt2.GPT2:
    """A tiny model to train, whole or by an adapter."""
    model = gpt2.GPT2(TINY if dropout else STILL)
    model.load_state_dict(tiny_gpt2(seed).state_dict())
    if adapter:
        lora.inject(model, r=4, dropout=0.1 if dropout else 0.0, seed=seed)
    return model


def run(model: nn.Module, data: gpt2.Dataset = DATA, **options) -> list[gpt2.StepRecord]:
    config = gpt2.TrainConfig(**{"lr": 1e-2, "steps": 6} | options)
    return list(gpt2.train(model, data, config))


def timeless(records: list[gpt2.StepRecord]) -> list[dict[str, float]]:
    """The records' metrics without what a clock says."""
    return [record.metrics() | {"seconds": 0} for record in records]


def micro_batches(config: gpt2.TrainConfig) -> list[list[gpt2.Batch]]:
    """Those of each step of a run of one epoch or less."""
    epoch = gpt2.batches(DATA, config.batch_size, seed=config.seed, epoch=0)
    return [list(islice(epoch, config.accumulate)) for _ in range(config.steps)]


def weights(model: nn.Module) -> dict[str, bytes]:
    return {name: raw(p) for name, p in model.named_parameters()}


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """A hash of all bytes."""
    made = blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        made.update(name.encode() + raw(tensor))
    return made.hexdigest()


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


class Logits(nn.Module):
    """A model that holds a GPT-2 and takes ids only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, idx):
        return self.module(idx)
