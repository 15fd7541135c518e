"""The article's run, from process start to saved adapter: 2,500 steps of five short texts.

Weights are random, since timing does not depend on them.

    python -m benchmarks.article_run --steps 2500
"""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks import harness

CODE = """
import sys, tempfile, torch, gpt2, lora
device, steps, dtype = sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3])
with torch.device(device):
    model = gpt2.GPT2(gpt2.SIZES["gpt2"])
model = model.to(dtype)
lora.inject(model, r=8, alpha=16, dropout=0.1, seed=42)
data = gpt2.encode(gpt2.read_jsonl("scripts/data/article.jsonl"), gpt2.Tokenizer(), max_length=128)
config = gpt2.TrainConfig(lr=1e-4, steps=steps, sync_every=5)
last = [record for record in gpt2.train(model, data, config)][-1]
lora.save(model, tempfile.mkdtemp())
print(last.loss, last.seconds)
"""


def main() -> None:
    a = harness.arguments(__doc__, steps=2500, dtype="bfloat16")
    seconds: list[float] = []
    training: list[float] = []
    for _ in range(min(a.repeats, 3)):
        began = time.perf_counter()
        command = [sys.executable, "-c", CODE, a.device, str(a.steps), a.dtype]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - began)
        training.append(float(ran.stdout.split()[-1]))
    harness.emit(
        "article_run",
        a.out,
        case=f"ours, {a.steps} steps",
        dtype=a.dtype,
        seconds=harness.spread(seconds),
        training_seconds=harness.spread(training),
    )


if __name__ == "__main__":
    main()
