"""A training step: forward, backward, clip and AdamW on one batch.

python -m benchmarks.train_step --B 16 --T 1024 --against peft     # the cases in turns
python -m benchmarks.train_step --B 16 --T 1024 --axis B=1,4,16,64  # ours alone; or T, r, size
python -m benchmarks.train_step --B 16 --T 1024 --profile 25       # the time of a GPU's kernels

`--profile` prints so many kernels by name, and reports all of them by what they are for.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness, models

WORK = ("B", "T", "size", "targets", "r")
PROFILED = 3  # steps
PURPOSES = {  # the first of which a kernel's name holds a word
    "attention": ("sdpa", "flash", "compute_dot_do_o", "convert_dq"),
    "matrix products": ("nvjet", "gemm", "cutlass", "splitK"),
    "softmax and loss of the head": ("prepare_softmax", "log_", "masked_fill"),
    "LayerNorm, dropout, residual sums": ("layer_norm",),
    "GELU": ("gelu",),
    "copies of q, k and v": ("stack",),
}


def main() -> None:
    a = harness.arguments(
        __doc__,
        B=1,
        T=22,
        size="gpt2",
        targets="c_attn",
        r=8,
        base_dropout=1,
        cases="",
        warmup=4,
        axis="",
        profile=0,
    )
    a.dtype = torch.float32 if a.device == "cpu" else torch.bfloat16
    if a.axis:
        grow(a)
    elif a.profile:
        report_kernels(a)
    else:
        compare(a)


def our_step(a: Any, **config: Any) -> models.OurStep:
    """Ours on random tokens."""
    model = our_model(a)
    return models.OurStep(model, models.batch(model, a.B, a.T), **config)


def our_model(a: Any) -> Any:
    how = {"targets": a.targets, "r": a.r, "base_dropout": bool(a.base_dropout)}
    return models.ours(a.size, a.device, a.dtype, **how)


def peft_step(
    a: Any, dtype: torch.dtype, checkpointing: bool = False, **how: Any
) -> models.PeftStep:
    """PEFT's on the same tokens, with the same weights."""
    model = our_model(a)
    step = models.PeftStep(models.theirs(model, dtype), models.batch(model, a.B, a.T), **how)
    if checkpointing:
        step.model.enable_input_require_grads()
        step.model.gradient_checkpointing_enable({"use_reentrant": False})
    return step


def compare(a: Any) -> None:
    """The cases in turns."""
    on_gpu, half = a.device != "cpu", torch.bfloat16
    cases: dict[str, Callable[[], Any]] = {"ours": partial(our_step, a)}
    if on_gpu:
        cases["ours compiled"] = partial(our_step, a, compile=True)
        cases["ours compiled, checkpointing"] = partial(
            our_step, a, compile=True, checkpointing=True
        )
    if a.against:
        cases["PEFT"] = partial(peft_step, a, torch.float32, autocast=on_gpu)
    if a.against and on_gpu:
        cases["PEFT bf16"] = partial(peft_step, a, half)
        cases["PEFT bf16, checkpointing"] = partial(peft_step, a, half, checkpointing=True)
        for mode in ("default", "reduce-overhead"):
            cases[f"PEFT compiled, {mode}"] = partial(peft_step, a, half, mode=mode)
    if a.cases:
        cases = {name: cases[name] for name in a.cases.split(";")}
    how = {"base_dropout": bool(a.base_dropout), "dtype": str(a.dtype).removeprefix("torch.")}
    for name, facts in measured(a, cases).items():
        harness.emit("train_step", a.out, case=name, **work(a), **how, **facts)


def grow(a: Any) -> None:
    """Ours alone, for some values of one size."""
    axis, _, values = a.axis.partition("=")
    for value in map(type(getattr(a, axis)), values.split(",")):
        one = argparse.Namespace(**{**vars(a), axis: value})
        build = partial(our_step, one, compile=a.device != "cpu")
        facts = measured(one, {"ours": build})["ours"]
        harness.emit("growth", a.out, case="ours", axis=axis, **work(one), **facts)
        harness.free()


def measured(a: Any, cases: Mapping[str, Callable[[], Any]]) -> dict[str, harness.Facts]:
    """Each case's peak memory and loss, and the milliseconds of all of them in turns."""
    facts = {name: harness.attempt(partial(begun, a, build)) for name, build in cases.items()}
    steps = {name: case.pop("step") for name, case in facts.items() if "step" in case}
    for name, ms in harness.interleaved(steps, a.repeats, a.device).items():
        facts[name] |= {"ms": ms, "tokens_per_s": round(a.B * a.T / ms["median"] * 1e3)}
    return facts


def begun(a: Any, build: Callable[[], Any]) -> harness.Facts:
    """A case's step, warmed up, with its peak memory and the loss before that."""
    resident = 0 if a.device == "cpu" else torch.cuda.memory_allocated()
    step = build()
    losses = [float(step().flatten()[0]) for _ in range(a.warmup)]
    if isinstance(step, models.OurStep):
        step.forget()
    peak = harness.peak_gib(step, a.device, resident)
    return {"step": step, "peak_gib": peak, "loss": round(losses[-1], 4)}


def report_kernels(a: Any) -> None:
    """Milliseconds and number of a compiled step's kernels, by what they are for."""
    step = our_step(a, compile=True)
    for _ in range(a.warmup):
        step()
    whole = harness.interleaved({"step": step}, 20, a.device)["step"]["median"]
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(PROFILED):
            step()
        torch.cuda.synchronize()
    print(profiled.key_averages().table(sort_by="cuda_time_total", row_limit=a.profile))
    ms, count = Counter[str](), Counter[str]()
    for event in profiled.key_averages():
        if event.device_type.name != "CUDA" or "#" in event.key:
            continue
        purpose = next((p for p, words in PURPOSES.items() if named(event.key, words)), "rest")
        ms[purpose] += event.self_device_time_total / 1e3 / PROFILED
        count[purpose] += event.count / PROFILED
    harness.emit("kernels", a.out, case="whole step", **work(a), kernel_ms=round(whole, 3))
    for purpose, total in ms.most_common():
        facts = {"kernel_ms": round(total, 3), "kernels": round(count[purpose])}
        harness.emit("kernels", a.out, case=purpose, **work(a), **facts)


def named(kernel: str, words: tuple[str, ...]) -> bool:
    return any(word in kernel for word in words)


def work(a: Any) -> harness.Facts:
    return {name: getattr(a, name) for name in WORK}


if __name__ == "__main__":
    main()
