"""A training step: forward, backward, clip and AdamW on one batch, by case.

python -m benchmarks.train_step --B 16 --T 1024 --against peft
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness, models


def main() -> None:
    a = harness.arguments(
        __doc__, B=1, T=22, size="gpt2", targets="c_attn", r=8, base_dropout=1, cases="", warmup=4
    )
    on_gpu = a.device != "cpu"
    dtype = torch.bfloat16 if on_gpu else torch.float32

    def our_model(targets: str = a.targets) -> Any:
        return models.ours(
            a.size, a.device, dtype, targets=targets, r=a.r, base_dropout=bool(a.base_dropout)
        )

    def build_ours(targets: str = a.targets, **config: Any) -> Callable[[], Any]:
        model = our_model(targets)
        return models.OurStep(model, models.batch(model, a.B, a.T), **config)

    def build_peft(kind: torch.dtype, checkpointing: bool = False, **how: Any) -> Any:
        model = our_model()
        step = models.PeftStep(models.theirs(model, kind), models.batch(model, a.B, a.T), **how)
        if checkpointing:
            step.model.enable_input_require_grads()
            step.model.gradient_checkpointing_enable({"use_reentrant": False})
        return step

    cases: dict[str, Callable[[], Any]] = {"ours": lambda: build_ours()}
    if on_gpu:
        cases |= {
            "ours compiled": lambda: build_ours(compile=True),
            "ours compiled, checkpointing": lambda: build_ours(compile=True, checkpointing=True),
        }
        if a.targets != "c_attn":
            cases["ours compiled, c_attn"] = lambda: build_ours("c_attn", compile=True)
    if a.against:
        cases["PEFT"] = lambda: build_peft(torch.float32, autocast=on_gpu)
        if on_gpu:
            best = "reduce-overhead" if a.B * a.T <= 4096 else "default"
            cases |= {
                "PEFT bf16": lambda: build_peft(torch.bfloat16),
                "PEFT bf16, checkpointing": lambda: build_peft(torch.bfloat16, checkpointing=True),
                "PEFT compiled": lambda: build_peft(torch.bfloat16, mode=best),
            }
    wanted = [name for name in cases if not a.cases or name in a.cases.split(";")]
    steps: dict[str, Any] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name in wanted:
        resident = torch.cuda.memory_allocated() if on_gpu else 0
        try:
            steps[name] = step = cases[name]()
            for _ in range(a.warmup - 1):
                step()
            last = step()
            if isinstance(step, models.OurStep):
                step.forget()
            peak = harness.peak_gib(step, a.device, resident)
            facts[name] = {"peak_gib": peak, "loss": round(float(last.flatten()[0]), 4)}
        except Exception as error:  # a case that cannot run is a result too
            facts[name] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
            steps.pop(name, None)
    times = harness.interleaved(steps, a.repeats, a.device)
    for name in wanted:
        median = times[name]["median"] if name in times else None
        harness.emit(
            "train_step",
            a.out,
            case=name,
            B=a.B,
            T=a.T,
            size=a.size,
            targets=a.targets,
            r=a.r,
            base_dropout=bool(a.base_dropout),
            dtype=str(dtype).removeprefix("torch."),
            ms=times.get(name),
            tokens_per_s=median and round(a.B * a.T / median * 1e3),
            **facts[name],
        )


if __name__ == "__main__":
    main()
