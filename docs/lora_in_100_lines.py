"""LoRA for GPT-2's attention in 100 lines of PyTorch: inject, train, merge, unmerge, save for PEFT.

`lora/` does the same and more; tests/test_hundred_lines.py holds the two equal.

    y = x W + b + s · x Aᵀ Bᵀ,   s = alpha / r,   A (r, in), B (out, r)
"""

import json
import math
from pathlib import Path

import safetensors.torch
import torch
from torch import nn


class LoRALinear(nn.Module):
    """A frozen GPT-2 Conv1D, whose weight is stored (in, out), with a low-rank update beside it."""

    def __init__(self, base, r, alpha):
        super().__init__()
        n_in, n_out = base.weight.shape
        self.base, self.scaling, self.merged = base, alpha / r, None
        self.A = nn.Parameter(torch.empty(r, n_in))
        self.B = nn.Parameter(torch.zeros(n_out, r))  # so that at first nothing changes
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        if self.merged is not None:
            return x @ self.merged + self.base.bias
        return self.base(x) + (x @ self.A.T) @ self.B.T * self.scaling


def inject(model, r=8, alpha=16):
    """Freeze the model and put an update beside each `c_attn`."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if name.endswith("c_attn"):
            above, _, last = name.rpartition(".")
            setattr(model.get_submodule(above), last, LoRALinear(module, r, alpha))


def updates(model):
    """The adapted layers, by the path of their base."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def train(model, batches, steps, lr):
    """Minimise the loss of `model(ids, labels)`; only A and B learn."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _, (ids, labels) in zip(range(steps), batches, strict=False):
        optimizer.zero_grad()
        loss = model(ids, labels)
        loss.backward()
        optimizer.step()


@torch.no_grad()
def merge(model):
    """Fold each update into a weight beside the base's: computed in float64, rounded once."""
    for layer in updates(model).values():
        delta = layer.scaling * (layer.B.double() @ layer.A.double())  # (out, in)
        layer.merged = (layer.base.weight.double() + delta.T).to(layer.base.weight.dtype)


def unmerge(model):
    """Forget the folded weights; the base's bytes were never written."""
    for layer in updates(model).values():
        layer.merged = None


def save(model, folder, r, alpha):
    """Write the adapter as PEFT does."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{path}.lora_{name}.weight": getattr(layer, name).detach().contiguous()
        for path, layer in updates(model).items()
        for name in "AB"
    }
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": alpha}
    config |= {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
