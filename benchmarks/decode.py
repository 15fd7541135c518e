"""Greedy decoding with a cache: from prompts to text, and token by token once it runs.

python -m benchmarks.decode --B 32 --against peft
"""

from __future__ import annotations

import copy
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
    folded = copy.deepcopy(model)
    lora.merge(folded)
    config = gpt2.GenerateConfig(max_new_tokens=a.new, eos=None)

    def ours(which: gpt2.GPT2) -> list[list[int]]:
        return gpt2.generate(which, prompts, config, compile=on_gpu)

    runs: dict[str, Any] = {"ours": lambda: ours(model), "ours merged": lambda: ours(folded)}
    news: dict[str, int] = dict.fromkeys(runs, int(a.new))
    if a.against:
        peft = _peft(model, prompts, dtype)
        runs["PEFT"] = lambda: peft(a.peft_new)
        runs["PEFT, a quarter"] = lambda: peft(a.peft_new // 4)
        news |= {"PEFT": a.peft_new, "PEFT, a quarter": a.peft_new // 4}
    for run in runs.values():
        run()
    texts = {name: run() for name, run in runs.items()}
    times = harness.interleaved(runs, a.repeats, a.device)
    steady = _steady({"ours": model, "ours merged": folded}, prompts, config, a.device)
    if a.against:
        more = times["PEFT"]["median"] - times.pop("PEFT, a quarter")["median"]
        steady["PEFT"] = more / (a.peft_new - a.peft_new // 4)
    for name, ms in times.items():
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
            steady_tokens_per_s=round(a.B / steady[name] * 1e3),
            same_tokens_as_ours=_shared(texts["ours"], texts[name]),
        )


def _shared(ours: list[list[int]], others: list[list[int]]) -> float:
    """The share of equal tokens, up to where the shorter texts end."""
    rows = zip(ours, others, strict=True)
    same = [x == y for mine, other in rows for x, y in zip(mine, other, strict=False)]
    return round(sum(same) / len(same), 4)


def _steady(
    cases: dict[str, gpt2.GPT2],
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


def _peft(model: gpt2.GPT2, prompts: list[list[int]], dtype: torch.dtype) -> Any:
    other = models.theirs(model, dtype)
    ids = torch.tensor(prompts, device=model.lm_head.weight.device)

    def generate(new: int) -> list[list[int]]:
        out = other.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=50256,
        )
        return out[:, ids.shape[1] :].tolist()

    return generate


if __name__ == "__main__":
    main()
