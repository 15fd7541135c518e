"""Greedy decoding with a cache: from prompts to text, and token by token once it runs.

python -m benchmarks.decode --B 32 --against peft
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

import gpt2
import lora
from benchmarks import harness, models
from gpt2.generation import Decoder

SPANS = 5  # timed stretches of up to 32 tokens


def main() -> None:
    a = harness.arguments(__doc__, B=1, prompt=32, new=256, size="gpt2", peft_new=64)
    on_gpu = a.device != "cpu"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = models.ours(a.size, a.device, dtype, dropout=0.0)
    prompts: list[list[int]] = models.batch(model, a.B, a.prompt).idx.tolist()
    merged = copy.deepcopy(model)
    lora.merge(merged)
    ours = {"ours": model, "ours merged": merged}
    config = gpt2.GenerateConfig(max_new_tokens=a.new, eos=None)
    runs: dict[str, Callable[[], list[list[int]]]] = {
        name: partial(gpt2.generate, which, prompts, config, compile=on_gpu)
        for name, which in ours.items()
    }
    new = dict.fromkeys(runs, a.new)
    if a.against:
        new["PEFT"] = a.peft_new
        runs["PEFT"] = partial(peft_of(model, prompts, dtype), a.peft_new)
    for run in runs.values():
        run()
    texts = {name: run() for name, run in runs.items()}
    times = harness.interleaved(runs, a.repeats, a.device)
    each = steady(ours, prompts, config, a.device)
    if a.against:  # as fast from its first token on
        each["PEFT"] = times["PEFT"]["median"] / a.peft_new
    work = {"B": a.B, "prompt": a.prompt, "size": a.size}
    work["dtype"] = str(dtype).removeprefix("torch.")
    for name, ms in times.items():
        facts = {
            "new": new[name],
            "ms": ms,
            "tokens_per_s": round(a.B * new[name] / ms["median"] * 1e3),
            "steady_tokens_per_s": round(a.B / each[name] * 1e3),
            "same_tokens_as_ours": equal_share(texts["ours"], texts[name]),
        }
        harness.emit("decode", a.out, case=name, **work, **facts)


def equal_share(ours: list[list[int]], others: list[list[int]]) -> float:
    """The share of equal tokens, up to where the shorter texts end."""
    rows = zip(ours, others, strict=True)
    same = [x == y for mine, other in rows for x, y in zip(mine, other, strict=False)]
    return round(sum(same) / len(same), 4)


def steady(
    cases: Mapping[str, gpt2.GPT2],
    prompts: list[list[int]],
    config: gpt2.GenerateConfig,
    device: str,
) -> dict[str, float]:
    """Milliseconds a token and row, once the prompts are read and the step is captured."""
    tokens = min(32, (config.max_new_tokens - 2) // SPANS)

    def steps(model: gpt2.GPT2) -> harness.Run:
        decoder = Decoder(model.eval(), prompts, config, compile=device != "cpu")
        decoder.step()
        return lambda: [decoder.step() for _ in range(tokens)]

    runs = {name: steps(model) for name, model in cases.items()}
    times = harness.interleaved(runs, SPANS, device)
    return {name: ms["median"] / tokens for name, ms in times.items()}


def peft_of(model: gpt2.GPT2, prompts: list[list[int]], dtype: torch.dtype) -> Any:
    """What gives PEFT's next tokens, so many of them."""
    other = models.theirs(model, dtype)
    ids = torch.tensor(prompts, device=model.lm_head.weight.device)
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 50256}

    def generate(new: int) -> list[list[int]]:
        out = other.generate(input_ids=ids, max_new_tokens=new, min_new_tokens=new, **how)
        return out[:, ids.shape[1] :].tolist()

    return generate


if __name__ == "__main__":
    main()
