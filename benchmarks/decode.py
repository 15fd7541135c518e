"""Greedy decoding with a cache: new tokens a second, all rows together.

python -m benchmarks.decode --B 32 --against peft
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch

import gpt2
import lora
from benchmarks import harness, models


def main() -> None:
    a = harness.arguments(__doc__, B=1, prompt=32, new=256, size="gpt2", peft_new=64)
    on_gpu = a.device != "cpu"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = models.ours(a.size, a.device, dtype, dropout=0.0)
    prompts: list[list[int]] = models.batch(model, a.B, a.prompt).idx.tolist()

    folded = copy.deepcopy(model)
    lora.merge(folded)
    config = gpt2.GenerateConfig(max_new_tokens=a.new, eos=None)

    def ours(which: gpt2.GPT2) -> list[list[int]]:
        return gpt2.generate(which, prompts, config, compile=on_gpu)

    runs: dict[str, Any] = {"ours": lambda: ours(model), "ours merged": lambda: ours(folded)}
    news: dict[str, int] = dict.fromkeys(runs, int(a.new))
    if a.against:
        other = models.theirs(model, dtype)
        ids = torch.tensor(prompts, device=a.device)

        def peft() -> list[list[int]]:
            out = other.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=a.peft_new,
                min_new_tokens=a.peft_new,
                do_sample=False,
                pad_token_id=50256,
            )
            return out[:, ids.shape[1] :].tolist()

        runs["PEFT"] = peft
        news["PEFT"] = a.peft_new
    texts: dict[str, list[list[int]]] = {}
    for name, run in runs.items():
        run()
        texts[name] = run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(a.repeats):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if on_gpu:
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - began) * 1e3)
    for name in runs:
        ms = harness.spread(times[name])
        shared = min(news[name], news["ours"])
        same = sum(
            x == y
            for mine, other in zip(texts["ours"], texts[name], strict=True)
            for x, y in zip(mine[:shared], other[:shared], strict=True)
        )
        harness.emit(
            "decode",
            a.out,
            case=name,
            B=a.B,
            prompt=a.prompt,
            new=news[name],
            size=a.size,
            dtype=str(dtype).removeprefix("torch."),
            ms=ms,
            tokens_per_s=round(a.B * news[name] / ms["median"] * 1e3),
            same_tokens_as_ours=round(same / (a.B * shared), 4),
        )


if __name__ == "__main__":
    main()
