"""Short runs of the scripts, and what they leave: for the tests of the scripts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

import gpt2
import lora

for package in ("jsonargparse", "docstring_parser", "yaml", "rich", "matplotlib"):
    pytest.importorskip(package, reason="the scripts need the extra 'scripts'")

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
ARTICLE = str(SCRIPTS / "data" / "article.jsonl")
QUICK = ("--steps", "3", "--generate.max_new_tokens", "2", "--device", "cpu")
MANY = [f'{{"prompt": "Q{i}:", "completion": " answer {i}"}}' for i in range(12)]
VALID = ["--validation", "0.4", "--eval_every", "2", "--train_batch_size", "2"]


def command(script: str, *arguments: str) -> list[str]:
    """A script in a process of its own."""
    return [sys.executable, str(SCRIPTS / script), *arguments]


def environment() -> dict[str, str]:
    """In which another process imports what this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


def two_processes(
    script: str, *arguments: str, second: Sequence[str] = ()
) -> list[tuple[int, str, str]]:
    """How a script ends in two processes without a torchrun; the second has more arguments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {**environment(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    group |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            command(script, *arguments, *more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**group, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank, more in (("0", ()), ("1", second))
    ]
    try:
        told = [run.communicate(timeout=120) for run in runs]
    finally:
        for run in runs:
            run.kill()
    return [(run.returncode, *texts) for run, texts in zip(runs, told, strict=True)]


def rows(file: Path) -> list[dict]:
    """The lines of a file of JSON, which has no NaN but in metrics."""
    strict = {} if file.name == "metrics.jsonl" else {"parse_constant": pytest.fail}
    return [json.loads(line, **strict) for line in file.read_text().splitlines()]


def write_rows(file: Path, lines: Iterable[dict]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text("utf-8"), parse_constant=pytest.fail)


def losses_of(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder / "metrics.jsonl")]


def weights_of(folder: Path, *names: str) -> list[bytes]:
    """The bytes of the adapters of these names."""
    return [(folder / name / "adapter_model.safetensors").read_bytes() for name in names]


def times_of(folder: Path) -> dict[Path, int]:
    """When each file below was written: equal if nothing was."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def assert_trained(adapter: Path, base: str = "demo") -> None:
    """An adapter is whole, and none of its updates is as it was born."""
    model = gpt2.GPT2.from_pretrained(base)
    lora.load(model, adapter)
    trained = [m for m in model.modules() if isinstance(m, lora.LowRankUpdate)]
    assert len(trained) == model.config.n_layer
    assert all(update.B.abs().max() > 0 for update in trained)


def stopped_after(step: int, saving, monkeypatch, number: int = signal.SIGTERM) -> None:
    """A signal to this process after a step of a run."""
    recorded = saving.recorded

    def killed(run, place):
        for record in recorded(run, place):
            yield record
            if record.step == step:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(saving, "recorded", killed)
