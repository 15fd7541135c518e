"""The same GPT-2 with the same adapter twice: ours, and transformers' with PEFT's."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

import gpt2
import lora
from gpt2.data.batches import Batch
from gpt2.fast.graphs import GraphedCalls
from gpt2.training.config import TrainConfig
from gpt2.training.step import Stepper

ALL = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
TARGETS = {"c_attn": ("attn.c_attn",), "all": ALL}


def ours(
    size: str,
    device: str,
    dtype: torch.dtype,
    *,
    targets: str = "c_attn",
    r: int = 8,
    dropout: float = 0.1,
    base_dropout: bool = True,
    config: gpt2.GPT2Config | None = None,
) -> gpt2.GPT2:
    """A GPT-2 of a published size, or of a config, with random weights and a LoRA adapter."""
    config = config or gpt2.SIZES[size]
    if not base_dropout:
        config = dataclasses.replace(config, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    torch.manual_seed(0)
    with torch.device(device):
        model = gpt2.GPT2(config)
    model = model.to(dtype).eval()
    lora.inject(model, r=r, alpha=16, dropout=dropout, targets=TARGETS[targets], seed=0)
    for update in updates(model).values():  # an adapter at birth would hide a wrong one
        torch.nn.init.normal_(update.B, std=0.01)
    return model


def updates(model: gpt2.GPT2) -> dict[str, lora.LowRankUpdate]:
    """The adapter's updates by the path of their layer."""
    layers = {p: m for p, m in model.named_modules() if isinstance(m, lora.LoRALinear)}
    return {p: cast(lora.LowRankUpdate, layer.updates["default"]) for p, layer in layers.items()}


def theirs(model: gpt2.GPT2, dtype: torch.dtype) -> Any:
    """PEFT on transformers' GPT-2, with our model's weights, factors and dropouts."""
    peft, transformers = (cast(Any, import_module(name)) for name in ("peft", "transformers"))

    c = model.config
    layers = lora.adapters(model)["default"]
    update = next(iter(layers.values()))
    config = transformers.GPT2Config(
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_embd=c.n_embd,
        embd_pdrop=c.embd_pdrop,
        attn_pdrop=c.attn_pdrop,
        resid_pdrop=c.resid_pdrop,
    )
    device = model.lm_head.weight.device
    with torch.device(device):
        base = transformers.GPT2LMHeadModel(config)
    base.load_state_dict(lora.base_state_dict(model))
    settings = peft.LoraConfig(
        r=update.r,
        lora_alpha=update.alpha,
        lora_dropout=update.dropout,
        target_modules=sorted({".".join(path.split(".")[-2:]) for path in layers}),
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(base.to(dtype), settings)
    with torch.no_grad():
        for path, mine in updates(model).items():
            other = wrapped.base_model.model.get_submodule(path)
            other.lora_A["default"].weight.copy_(mine.A)
            other.lora_B["default"].weight.copy_(mine.B)
    return wrapped.eval()


def batch(model: gpt2.GPT2, B: int, T: int) -> Batch:
    """Random tokens, all learnt."""
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(0, model.config.vocab_size, (B, T), generator=generator)
    return Batch(idx, idx.clone(), B * (T - 1)).to(model.lm_head.weight.device)


class OurStep:
    """Our training step on one batch."""

    def __init__(self, model: gpt2.GPT2, data: Batch, **config: Any) -> None:
        self.model, self.data = model.train(), data
        self.stepper = Stepper(model, TrainConfig(steps=1, lr=1e-4, **config))
        self.steps = 0

    def __call__(self) -> Tensor:
        self.steps += 1
        return self.stepper([self.data], self.steps)

    def forget(self) -> None:
        """Drop the CUDA graph: the next call captures one, and shows what memory a step takes."""
        if self.stepper.graphs is not None:
            self.stepper.graphs = GraphedCalls()


class PeftStep:
    """PEFT's: forward with labels, backward, clip, fused AdamW; optionally compiled."""

    def __init__(
        self, model: Any, data: Batch, *, mode: str | None = None, autocast: bool = False
    ) -> None:
        self.model, self.data, self.autocast = model.train(), data, autocast
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self.run = model if mode is None else torch.compile(model, mode=mode, dynamic=False)

    def __call__(self) -> Tensor:
        kind = self.data.idx.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.autocast):
            loss = self.run(input_ids=self.data.idx, labels=self.data.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()
