"""The article's run, from process start to saved adapter: 2,500 steps of five short texts.

Weights are random, since timing does not depend on them.

    python -m benchmarks.article_run --steps 2500 --against peft
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from benchmarks import harness

PARTS = (
    "start and imports",
    "model",
    "adapter",
    "data",
    "first steps",
    "other steps",
    "save",
    "exit",
)
CODE = """
import sys, tempfile, time
import torch, gpt2, lora
device, steps, dtype = sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3])
marks = [float(sys.argv[4]), time.time()]
with torch.device(device):
    model = gpt2.GPT2(gpt2.SIZES["gpt2"])
model = model.to(dtype)
if device != "cpu":
    torch.cuda.synchronize()
marks.append(time.time())
lora.inject(model, r=8, alpha=16, dropout=0.1, seed=42)
marks.append(time.time())
examples = gpt2.read_examples("scripts/data/article.jsonl")
data = gpt2.encode(examples, gpt2.Tokenizer(), max_length=128)
marks.append(time.time())
config = gpt2.TrainConfig(lr=1e-4, steps=steps)
records = gpt2.train(model, data, config)
for record in records:
    if record.step == 5:  # one of each text: all that is captured is captured
        marks.append(time.time())
marks.append(time.time())
lora.save(model, tempfile.mkdtemp())
marks.append(time.time())
print(*[after - before for before, after in zip(marks, marks[1:])], marks[-1], record.seconds)
"""
PEFT = """
import sys, tempfile, time, torch, peft, gpt2
from transformers import GPT2Config, GPT2LMHeadModel, get_linear_schedule_with_warmup
device, steps = sys.argv[1], int(sys.argv[2])
with torch.device(device):
    base = GPT2LMHeadModel(GPT2Config())
model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1,
    target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")).train()
examples = gpt2.read_examples("scripts/data/article.jsonl")
data = gpt2.encode(examples, gpt2.Tokenizer(), max_length=128)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
began, step = time.perf_counter(), 0
while step < steps:
    for batch in gpt2.batches(data, 1, seed=42, epoch=step):
        batch = batch.to(torch.device(device))
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            loss = model(input_ids=batch.idx, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step += 1
loss = loss.item()
seconds = time.perf_counter() - began
model.save_pretrained(tempfile.mkdtemp())
print(time.time(), seconds)
"""


def main() -> None:
    a = harness.arguments(__doc__, steps=2500, peft_steps=250, dtype="bfloat16")
    cases = {f"ours, {a.steps} steps": (CODE, a.steps)}
    if a.against:  # a tenth of the steps is enough to see the rate
        cases[f"PEFT, {a.peft_steps} steps"] = (PEFT, a.peft_steps)
    for name, (code, steps) in cases.items():
        seconds: list[float] = []
        training: list[float] = []
        parts: list[list[float]] = []
        for _ in range(min(a.repeats, 3)):
            began = time.time()
            how = [a.device, str(steps), a.dtype, str(began)]
            command = [sys.executable, "-c", code, *how]
            ran = subprocess.run(command, capture_output=True, text=True, check=True)
            *took, saved, last = map(float, ran.stdout.split())
            parts.append([*took, time.time() - saved])
            seconds.append(saved - began)
            training.append(last)
        harness.emit(
            "article_run",
            a.out,
            case=name,
            dtype=a.dtype,
            seconds=harness.spread(seconds),
            training_seconds=harness.spread(training),
            parts={
                name: round(statistics.median(values), 3)
                for name, *values in zip(PARTS, *parts, strict=False)
                if code == CODE
            },
        )


if __name__ == "__main__":
    main()
