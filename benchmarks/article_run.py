"""The article's run, from process start to saved adapter: 2,500 steps of five short texts.

Weights are random, since timing does not depend on them. Beside it, what starting alone takes:
imports over importing torch, and opening the demo base ready to train.

python -m benchmarks.article_run --steps 2500 --against peft
python -m benchmarks.article_run --cases startup --against peft
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks import harness

PARTS = "start and imports, model, adapter, data, first steps, other steps, save, exit".split(", ")
OURS = """
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
for record in gpt2.train(model, data, gpt2.TrainConfig(lr=1e-4, steps=steps)):
    if record.step == 5:  # one of each text: all that is captured is captured
        record.loss  # waits for the device
        marks.append(time.time())
seconds = record.seconds
marks.append(time.time())
lora.save(model, tempfile.mkdtemp())
marks.append(time.time())
print(*[after - before for before, after in zip(marks, marks[1:])], marks[-1], seconds)
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
CLOCK = "import time; began = time.perf_counter(); {}; print(time.perf_counter() - began)"
OPENED = 'm = gpt2.GPT2.from_pretrained("demo"); lora.inject(m)'
STARTUP = {
    "import torch": CLOCK.format("import torch"),
    "import torch, lora, gpt2": CLOCK.format("import torch, lora, gpt2"),
    "open demo, inject": f"import lora, gpt2; {CLOCK.format(OPENED)}",
}
PEFT_IMPORTS = "import torch, peft; from transformers import GPT2LMHeadModel"


def main() -> None:
    a = harness.arguments(
        __doc__, cases="startup;run", steps=2500, peft_steps=250, dtype="bfloat16"
    )
    if "startup" in a.cases.split(";"):
        startup(a)
    if "run" in a.cases.split(";"):
        whole_run(f"ours, {a.steps} steps", OURS, a.steps, a)
        if a.against:  # a tenth of the steps is enough to see the rate
            whole_run(f"PEFT, {a.peft_steps} steps", PEFT, a.peft_steps, a)


def startup(a: Any) -> None:
    """Seconds of each start, in processes of their own, in turns."""
    cases = dict(STARTUP)
    if a.against:
        cases["import torch, transformers, peft"] = CLOCK.format(PEFT_IMPORTS)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(a.repeats):
        for name, code in cases.items():
            seconds[name] += printed(code)
    for name, values in seconds.items():
        harness.emit("startup", a.out, case=name, seconds=harness.spread(values))


def whole_run(name: str, code: str, steps: int, a: Any) -> None:
    """Seconds to the saved adapter, of three runs, and of ours what each part takes."""
    runs: list[list[float]] = []
    for _ in range(min(a.repeats, 3)):
        began = time.time()
        *parts, saved, trained = printed(code, a.device, str(steps), a.dtype, str(began))
        runs.append([saved - began, trained, *parts, time.time() - saved])
    seconds, training, *each = ([*column] for column in zip(*runs, strict=True))
    facts: harness.Facts = {"dtype": a.dtype, "seconds": harness.spread(seconds)}
    facts["training_seconds"] = harness.spread(training)
    if code == OURS:
        medians = [round(statistics.median(part), 3) for part in each]
        facts["parts"] = dict(zip(PARTS, medians, strict=True))
    harness.emit("article_run", a.out, case=name, **facts)


def printed(code: str, *arguments: str) -> list[float]:
    """The numbers that a new process prints last."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.splitlines()[-1].split()]


if __name__ == "__main__":
    main()
