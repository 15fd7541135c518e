"""One forward pass of rows under many adapters, against rows under one.

python -m benchmarks.routing --B 32 --T 64 --adapters 16 --against peft
"""

from __future__ import annotations

from typing import Any

import torch

import lora
from benchmarks import harness, models


def main() -> None:
    a = harness.arguments(__doc__, B=8, T=32, adapters=8, size="gpt2")
    dtype = torch.bfloat16 if a.device != "cpu" else torch.float32
    model = models.ours(a.size, a.device, dtype, dropout=0.0)
    names = ["default", *(f"task{i}" for i in range(1, a.adapters))]
    for seed, name in enumerate(names[1:], 1):
        lora.inject(model, r=8, alpha=16, targets=models.TARGETS["c_attn"], adapter=name, seed=seed)
    lora.activate(model, "default")
    model.requires_grad_(False)
    idx = models.batch(model, a.B, a.T).idx
    rows = [names[b % len(names)] for b in range(a.B)]

    @torch.no_grad()
    def one() -> Any:
        return model(idx)

    with torch.no_grad():
        routing = lora.routed(model, rows)

        def mixed() -> Any:
            with torch.no_grad():
                return model(idx)

        routing.__enter__()
        layers = [m for m in model.modules() if isinstance(m, lora.LoRALinear)]
        routes = [layer.routing for layer in layers]

    def switch(on: bool, run: Any) -> Any:
        for layer, route in zip(layers, routes, strict=True):
            layer.routing = route if on else None
        return run()

    runs: dict[str, Any] = {
        "ours, one adapter": lambda: switch(False, one),
        f"ours, {a.adapters} adapters mixed": lambda: switch(True, mixed),
    }
    if a.against:
        other = models.theirs(model, dtype)
        import peft

        config = other.peft_config["default"]
        for name in names[1:]:
            other.add_adapter(name, peft.LoraConfig(**config.to_dict()))
        other.eval()

        @torch.no_grad()
        def peft_one() -> Any:
            return other(input_ids=idx)

        @torch.no_grad()
        def peft_mixed() -> Any:
            return other(input_ids=idx, adapter_names=rows)

        runs |= {"PEFT, one adapter": peft_one, f"PEFT, {a.adapters} adapters mixed": peft_mixed}
    for run in runs.values():
        for _ in range(3):
            run()
    times = harness.interleaved(runs, a.repeats, a.device)
    for name, ms in times.items():
        one_ms = times[f"{name.split(',')[0]}, one adapter"]["median"]
        ratio = round(ms["median"] / one_ms, 3)
        harness.emit(
            "routing", a.out, case=name, B=a.B, T=a.T, size=a.size, ms=ms, against_one=ratio
        )


if __name__ == "__main__":
    main()
