"""Starting up: imports over importing torch alone, and opening the demo base ready to train.

python -m benchmarks.startup
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks import harness

CLOCK = "import time; began = time.perf_counter(); {}; print(time.perf_counter() - began)"
CASES = {
    "import torch": CLOCK.format("import torch"),
    "import torch, lora, gpt2": CLOCK.format("import torch, lora, gpt2"),
    "open demo, inject": "import lora, gpt2; "
    + CLOCK.format('m = gpt2.GPT2.from_pretrained("demo"); lora.inject(m)'),
}


def main() -> None:
    a = harness.arguments(__doc__)
    cases = dict(CASES)
    if a.against:
        cases["import torch, transformers, peft"] = CLOCK.format(
            "import torch, peft; from transformers import GPT2LMHeadModel"
        )
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(a.repeats):
        for name, code in cases.items():
            ran = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            )
            seconds[name].append(float(ran.stdout.split()[-1]))
    for name, values in seconds.items():
        harness.emit("startup", a.out, case=name, seconds=harness.spread(values))


if __name__ == "__main__":
    main()
