"""The article's five answers learnt from a float32 and from a bfloat16 base: where the loss ends.

python -m benchmarks.curve --steps 500
"""

from __future__ import annotations

import statistics

import numpy as np
import torch

import gpt2
import lora
from benchmarks import harness
from gpt2.data.batches import collate

END = 100  # steps whose mean loss counts as the end


def main() -> None:
    a = harness.arguments(__doc__, steps=500, seeds=3, base="demo")
    tokenizer = gpt2.Tokenizer()
    data = gpt2.encode(gpt2.read_examples("scripts/data/article.jsonl"), tokenizer, max_length=128)
    whole = collate(data, np.arange(len(data))).to(torch.device(a.device))
    for dtype in (torch.float32, torch.bfloat16):
        ends: list[float] = []
        answers: list[float] = []
        curves: list[list[float]] = []
        for seed in range(a.seeds):
            model = gpt2.GPT2.from_pretrained(a.base, dtype=dtype, device=a.device).eval()
            lora.inject(model, r=8, alpha=16, dropout=0.1, seed=seed)
            config = gpt2.TrainConfig(lr=3e-3, steps=a.steps, seed=seed)
            losses = [record.loss for record in gpt2.train(model, data, config)]
            ends.append(statistics.mean(losses[-END:]))
            curves.append(losses)
            with torch.no_grad():
                total = gpt2.summed_loss(model, whole.idx, whole.labels)
            answers.append(float(total) / whole.n_tokens)
        every = max(a.steps // 10, 1)
        means = [statistics.mean(step) for step in zip(*curves, strict=True)]
        harness.emit(
            "curve",
            a.out,
            case=str(dtype).removeprefix("torch."),
            steps=a.steps,
            seeds=a.seeds,
            curve=[
                round(statistics.mean(means[i : i + every]), 4) for i in range(0, a.steps, every)
            ],
            end=round(statistics.mean(ends), 4),
            end_without_dropout=round(statistics.mean(answers), 4),
        )


if __name__ == "__main__":
    main()
