"""A killed process under torchrun: how long until training goes on, and whether bits are the same.

python -m benchmarks.restart --world 2 --out results.jsonl
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import gpt2
import lora
from benchmarks import harness

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
STEPS, KILLED_AT = 60, 20


def train(folder: Path, world: int) -> None:
    """One of the processes that torchrun starts; it goes on where there is a snapshot."""
    sys.path.insert(0, str(SCRIPTS))
    import processes  # pyright: ignore[reportMissingImports]  # as torchrun finds it

    with processes.joined():
        device = processes.own_device("cuda" if torch.cuda.is_available() else "cpu")
        model = gpt2.GPT2.from_pretrained("demo", device=device)
        lora.inject(model, r=8, alpha=16, dropout=0.1, seed=0)
        data = gpt2.encode(["in the beginning", "was the word", "and so on"] * 4, gpt2.Tokenizer())
        config = gpt2.TrainConfig(steps=STEPS, accumulate=world)
        run = gpt2.RunConfig(save_every=5, folder=folder)
        resume = any(folder.glob("snapshot*.safetensors"))
        for record in gpt2.fit(model, data, config, run=run, resume=resume):
            if not processes.rank():
                with (folder / "steps").open("a") as file:
                    file.write(f"{record.step} {record.loss!r} {time.time()}\n")
            time.sleep(0.05)
        if not processes.rank():
            lora.save(model, folder / "adapter")


def measured(world: int, victim: int | None) -> tuple[float, bytes]:
    """Seconds from the kill to the first step after it, and the adapter at the end."""
    with tempfile.TemporaryDirectory() as place:
        folder, how = Path(place), [f"--nproc_per_node={world}", "--max_restarts=1"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *how, "-m"]
        arguments = ["benchmarks.restart", "--folder", place, "--world", str(world)]
        started = subprocess.Popen([*command, *arguments])
        killed = 0.0
        while victim is not None and not killed:
            time.sleep(0.02)
            if started.poll() is not None:
                raise RuntimeError("it ended before it could be killed")
            if (folder / "steps").exists() and len(_steps(folder)) >= KILLED_AT:
                children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text()
                os.kill(int(children.split()[victim]), signal.SIGKILL)
                killed = time.time()
        if started.wait(200):
            raise RuntimeError(f"torchrun ended with {started.returncode}")
        again = [float(at) for _, _, at in _steps(folder)]
        first = min((at for at in again if at > killed + 0.5), default=0.0)
        return first - killed, (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def _steps(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "steps").read_text().splitlines()]


def main() -> None:
    a = harness.arguments(__doc__, world=2, folder="")
    if a.folder:
        train(Path(a.folder), a.world)
        return
    _, want = measured(a.world, None)
    for victim in (0, a.world - 1):
        seconds, got = measured(a.world, victim)
        facts = {"killed": victim, "seconds": round(seconds, 2), "same_bytes": got == want}
        harness.emit("restart", a.out, case="SIGKILL to training again", gpus=a.world, **facts)


if __name__ == "__main__":
    main()
