"""Does all of it work on this machine's device? Each thing is done there and on the CPU.

python -m benchmarks.device_check --device mps

It takes a minute or two, prints a line a thing, and exits with 1 if one of them fails or differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import gpt2
import lora

Check = Callable[[torch.device], Tensor]

TOLERANCE = 1e-3  # of the largest number of a result; of tokens none may differ
ROUGH = 5e-2  # the same where the CPU and the device round to 16 bits, each in its own order
TEXTS = ["Q: What does physics explain?\nA: Physics explains how the world moves.", "In the end"]
TARGETS = ("attn.c_attn", "mlp.c_proj")


def base(device: torch.device, dtype: torch.dtype | None = None) -> gpt2.GPT2:
    return gpt2.GPT2.from_pretrained("demo", device=device, dtype=dtype, dropout=0.0)


def adapted(device: torch.device, std: float = 0.03) -> gpt2.GPT2:
    """The demo base with an adapter that changes what it writes; at birth where `std` is 0."""
    model = base(device)
    lora.inject(model, r=4, targets=TARGETS, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in lora.trainable_parameters(model) if std else ():
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model


def logits(model: gpt2.GPT2) -> Tensor:
    idx = torch.arange(2000, 2064).view(2, 32).to(model.lm_head.weight.device)
    with torch.no_grad():
        return model(idx).float()


def tokens(device: torch.device, **options: Any) -> Tensor:
    tokenizer = gpt2.Tokenizer()
    config = gpt2.GenerateConfig(max_new_tokens=24, eos=None, **options)
    return torch.tensor(gpt2.generate(base(device), [tokenizer.encode(t) for t in TEXTS], config))


def training(device: torch.device, full: bool = False, **options: Any) -> Tensor:
    """Loss and gradient norm of a few steps, and the logits after them."""
    model = base(device) if full else adapted(device, std=0)
    steps, lr = (3, 1e-4) if full else (6, 1e-3)
    config = gpt2.TrainConfig(steps=steps, lr=lr, batch_size=2, **options)
    records = list(gpt2.train(model, gpt2.encode(TEXTS, gpt2.Tokenizer()), config))
    figures = torch.tensor([number for r in records for number in (r.loss, r.grad_norm)])
    return torch.cat([figures, logits(model).flatten().cpu()])


def birth(device: torch.device) -> Tensor:
    at_birth = logits(adapted(device, std=0))
    assert torch.equal(at_birth, logits(base(device))), "an adapter at birth changes the logits"
    return at_birth


def merging(device: torch.device) -> Tensor:
    model = adapted(device)
    before = logits(model)
    with lora.merged(model):
        merged = logits(model)
    assert torch.equal(logits(model), before), "unmerge does not give back the logits of before"
    return merged


def saving(device: torch.device) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        lora.save(adapted(device), folder)
        model = base(device)
        lora.load(model, folder)
        return logits(model)


def routing(device: torch.device) -> Tensor:
    model = adapted(device)
    with lora.routed(model, ["default", None]):
        return logits(model)


CHECKS: Mapping[str, Check] = {
    "logits": lambda device: logits(base(device)),
    "logits in bfloat16": lambda device: logits(base(device, torch.bfloat16)),
    "greedy text": tokens,
    "sampled text": lambda device: tokens(device, temperature=0.8, top_k=50, top_p=0.95, seed=1),
    "text with a repetition penalty": lambda device: tokens(device, repetition_penalty=1.3),
    "an adapter at birth": birth,
    "an adapter's logits": lambda device: logits(adapted(device)),
    "training an adapter": training,
    "training all weights": lambda device: training(device, full=True),
    "training with checkpointing": lambda device: training(device, checkpointing=True),
    "training in 16 bits (autocast)": lambda device: training(device, autocast=True),
    "merge and unmerge": merging,
    "save and load": saving,
    "rows under different adapters": routing,
}


def outcome(check: Check, device: torch.device, tolerance: float) -> str:
    """Whether the check gives on the device what it gives on the CPU, in words."""
    wanted = check(torch.device("cpu"))
    try:
        got = check(device).cpu()
    except Exception as error:  # whatever it is, the other checks go on
        first, *_ = str(error).strip().splitlines() or [""]
        return f"fails with {type(error).__name__}: {first[:300]}"
    if not wanted.is_floating_point():
        other = int((wanted != got).sum())
        return f"differs in {other} of {got.numel()} tokens" if other else "works"
    error = float((wanted - got).abs().max() / wanted.abs().max())
    if error <= tolerance:  # NaN is not
        return f"works (rounding {error:.0e})"
    return f"differs by {error:.1e} of the largest number"


def main(device: str, checks: Mapping[str, Check] = CHECKS) -> int:
    """Print a line a check; returns 1 if one of them does not work, else 0."""
    print(f"torch {torch.__version__}, device {device}, beside the CPU")
    all_work = True
    for name, check in checks.items():
        words = outcome(check, torch.device(device), ROUGH if "16" in name else TOLERANCE)
        all_work &= words.startswith("works")
        print(f"{name:32}{words}", flush=True)
    return 0 if all_work else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default="mps" if torch.mps.is_available() else usual)
    sys.exit(main(parser.parse_args().device))
