"""Does all of it work on this machine's device? Each thing is done there and on the CPU.

python -m benchmarks.device_check --device mps

It takes a minute or two, prints a line a thing, and exits with 1 if one of them fails or differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping

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


def adapted(device: torch.device) -> gpt2.GPT2:
    """The demo base with an adapter that changes what it writes."""
    model = base(device)
    lora.inject(model, r=4, targets=TARGETS, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in lora.trainable_parameters(model):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.03)
    return model


def logits(model: gpt2.GPT2) -> Tensor:
    idx = torch.arange(2000, 2064).view(2, 32).to(model.lm_head.weight.device)
    with torch.no_grad():
        return model(idx).float()


def tokens(device: torch.device, **options: float) -> Tensor:
    tokenizer = gpt2.Tokenizer()
    config = gpt2.GenerateConfig(max_new_tokens=24, eos=None, **options)  # pyright: ignore
    return torch.tensor(gpt2.generate(base(device), [tokenizer.encode(t) for t in TEXTS], config))


def training(device: torch.device, **options: bool) -> Tensor:
    """Loss and gradient norm of a few steps on an adapter, and what the model says after them."""
    model = base(device)
    lora.inject(model, r=4, targets=TARGETS, seed=0)
    config = gpt2.TrainConfig(steps=6, lr=1e-3, batch_size=2, **options)  # pyright: ignore
    records = list(gpt2.train(model, gpt2.encode(TEXTS, gpt2.Tokenizer()), config))
    figures = torch.tensor([number for r in records for number in (r.loss, r.grad_norm)])
    return torch.cat([figures, logits(model).flatten().cpu()])


def full_training(device: torch.device) -> Tensor:
    model = base(device)
    config = gpt2.TrainConfig(steps=3, lr=1e-4, batch_size=2)
    list(gpt2.train(model, gpt2.encode(TEXTS, gpt2.Tokenizer()), config))
    return logits(model)


def birth(device: torch.device) -> Tensor:
    model = base(device)
    before = logits(model)
    lora.inject(model, r=4, targets=TARGETS, seed=0)
    if not torch.equal(logits(model), before):
        raise RuntimeError("an adapter at birth changes the logits")
    return before


def merging(device: torch.device) -> Tensor:
    model = adapted(device)
    before = logits(model)
    lora.merge(model)
    merged = logits(model)
    lora.unmerge(model)
    if not torch.equal(logits(model), before):
        raise RuntimeError("unmerge does not give back the logits of before")
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
    "training all weights": full_training,
    "training with checkpointing": lambda device: training(device, checkpointing=True),
    "training in 16 bits (autocast)": lambda device: training(device, autocast=True),
    "merge and unmerge": merging,
    "save and load": saving,
    "rows under different adapters": routing,
}


def outcome(check: Check, device: torch.device, tolerance: float) -> tuple[bool, str]:
    """Whether the check gives on the device what it gives on the CPU, and that in words."""
    wanted = check(torch.device("cpu"))
    try:
        got = check(device).cpu()
    except Exception as error:  # whatever it is, the other checks go on
        lines = str(error).strip().splitlines() or [""]
        return False, f"fails with {type(error).__name__}: {lines[0][:300]}"
    if not wanted.is_floating_point():
        other = int((wanted != got).sum())
        return not other, f"differs in {other} of {got.numel()} tokens" if other else "works"
    apart = float((wanted - got).abs().max() / wanted.abs().max())
    if not apart <= tolerance:  # NaN too
        return False, f"differs by {apart:.1e} of the largest number"
    return True, f"works (rounding {apart:.0e})"


def default_device() -> str:
    if torch.backends.mps.is_available():
        return "mps"
    return "cuda" if torch.cuda.is_available() else "cpu"


def main(device: str, checks: Mapping[str, Check] = CHECKS) -> int:
    """Print a line a check; returns 1 if one of them does not work, else 0."""
    print(f"torch {torch.__version__}, device {device}, beside the CPU")
    all_work = True
    for name, check in checks.items():
        tolerance = ROUGH if "16" in name else TOLERANCE
        works, words = outcome(check, torch.device(device), tolerance)
        all_work &= works
        print(f"{name:32}{words}", flush=True)
    return 0 if all_work else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=default_device())
    sys.exit(main(parser.parse_args().device))
