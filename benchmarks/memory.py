"""What a training step keeps for its backward pass, in four blocks with all linears adapted.

python -m benchmarks.memory --against peft
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gpt2
import lora
from benchmarks import harness, models


def main() -> None:
    a = harness.arguments(__doc__, B=1, T=512, n_layer=4, r=8)
    config = dataclasses.replace(gpt2.SIZES["gpt2"], n_layer=a.n_layer)
    idx = torch.randint(50257, (a.B, a.T), device=a.device)

    def build(fused: bool = True, train_all: bool = False) -> gpt2.GPT2:
        model = models.ours("gpt2", a.device, torch.bfloat16, targets="all", r=a.r, config=config)
        if train_all:
            lora.eject(model)
            model.requires_grad_(False)
            model.transformer.h.requires_grad_(True)
        for module in model.modules():
            if isinstance(module, lora.LoRALinear):
                module.fused = fused
        return model.train()

    def body(model: gpt2.GPT2) -> Callable[[], Any]:
        return lambda: model.transformer(idx)

    cases = {
        "ours": body(build()),
        "ours, the readable path": body(build(fused=False)),
        "full fine-tuning of ours": body(build(train_all=True)),
    }
    if a.against:
        theirs = models.theirs(build(), torch.bfloat16).train()
        cases["PEFT"] = lambda: theirs.base_model.model.transformer(input_ids=idx)
    for name, run in cases.items():
        harness.emit(
            "memory", a.out, case=name, B=a.B, T=a.T, n_layer=a.n_layer, r=a.r, kept_mib=_kept(run)
        )


def _kept(run: Callable[[], Any]) -> float:
    """MiB of memory that autograd holds after a forward pass, parameters left out."""
    blocks: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no memory is used, and counted, twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            blocks[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return round(sum(blocks.values()) / 2**20, 1)


if __name__ == "__main__":
    main()
