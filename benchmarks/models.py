"""The same GPT-2 with the same adapter twice: ours, and transformers' with PEFT's."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

import gpt2
import lora
from gpt2.training.step import Stepper

SIZES = {**gpt2.SIZES, "demo": gpt2.GPT2Config(n_layer=8, n_head=4, n_embd=256)}
ALL = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
TARGETS = {"c_attn": ("attn.c_attn",), "all": ALL}


def base(size: str, device: str, dtype: torch.dtype, *, dropout: bool = True) -> gpt2.GPT2:
    """A GPT-2 of a published size, or the bundled one's, with random weights."""
    config = SIZES[size]
    if not dropout:
        config = dataclasses.replace(config, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    torch.manual_seed(0)
    with torch.device(device):
        model = gpt2.GPT2(config)
    return model.to(dtype).eval()


def ours(
    size: str,
    device: str,
    dtype: torch.dtype,
    *,
    targets: str = "c_attn",
    r: int = 8,
    dropout: float = 0.1,
    base_dropout: bool = True,
) -> gpt2.GPT2:
    """The same with a LoRA adapter."""
    model = base(size, device, dtype, dropout=base_dropout)
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

    layers = lora.adapters(model)["default"]
    update = next(iter(layers.values()))
    names = "n_layer n_head n_embd embd_pdrop attn_pdrop resid_pdrop".split()
    config = transformers.GPT2Config(**{name: getattr(model.config, name) for name in names})
    with torch.device(model.lm_head.weight.device):
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


def batch(model: gpt2.GPT2, B: int, T: int) -> gpt2.Batch:
    """Random tokens, all learnt."""
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(0, model.config.vocab_size, (B, T), generator=generator)
    return gpt2.Batch(idx, idx.clone(), B * (T - 1)).to(model.lm_head.weight.device)


class OurStep:
    """Our training step on one batch."""

    def __init__(self, model: gpt2.GPT2, data: gpt2.Batch, **config: Any) -> None:
        self.model, self.data = model.train(), data
        self.config = gpt2.TrainConfig(steps=1, lr=1e-4, **config)
        self.forget()

    def __call__(self) -> Tensor:
        self.steps += 1
        return self.stepper([self.data], self.steps)

    def forget(self) -> None:
        """Begin anew: the next call captures a CUDA graph, and shows what memory a step takes."""
        self.stepper, self.steps = Stepper(self.model, self.config), 0


class PeftStep:
    """PEFT's: forward with labels, backward, clip, fused AdamW; optionally compiled."""

    def __init__(
        self, model: Any, data: gpt2.Batch, *, mode: str | None = None, autocast: bool = False
    ) -> None:
        self.model, self.data, self.autocast = model.train(), data, autocast
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self.run = model if mode is None else torch.compile(model, mode=mode, dynamic=False)

    def __call__(self) -> Tensor:
        device = self.data.idx.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.autocast):
            loss = self.run(input_ids=self.data.idx, labels=self.data.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()
