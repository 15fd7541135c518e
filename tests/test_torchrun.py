"""`torchrun scripts/train_qa.py`, as a user starts it: killed, stopped, with fewer processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.test_scripts import QUICK, SCRIPTS

for package in ("jsonargparse", "docstring_parser", "yaml", "rich", "matplotlib"):
    pytest.importorskip(package, reason="the scripts need the extra 'scripts'")
if not Path("/proc/self/task").is_dir():
    pytest.skip("the tests look for child processes in /proc", allow_module_level=True)

TRAIN = str(SCRIPTS / "train_qa.py")
STEPS = 15
OPTIONS = [*QUICK, "--steps", str(STEPS), "--accumulate", "2", "--validation"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # as torchrun has it: sums are in its order
OPTIONS += ["0.4", "--save_every", "2", "--train_batch_size", "1", "--device", "cpu"]


def started(*argv: str, processes: int = 2, port: int | None = None, restarts: int = 0) -> Any:
    where = ["--standalone"] if port is None else ["--master_port", str(port)]
    how = [*where, f"--nproc_per_node={processes}", f"--max_restarts={restarts}"]
    command = [sys.executable, "-m", "torch.distributed.run", *how, *argv]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=ONE_THREAD)


def after(step: int, folder: Path, run: Any) -> list[int]:
    """Wait for the step; gives the ids of the workers."""
    file, until = folder / "metrics.jsonl", time.monotonic() + 40
    while not file.exists() or file.read_text().count("\n") < step:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    return [int(p) for p in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]


def ended(run: Any) -> tuple[int, str, str]:
    try:
        out, err = run.communicate(timeout=60)
    finally:
        run.kill()
    return run.returncode, out, err


def outcome(folder: Path) -> Any:
    """The bytes of both adapters, and what the steps told but for the clock."""
    files = [folder / name / "adapter_model.safetensors" for name in ("adapter", "last")]
    told = (folder / "metrics.jsonl").read_text().splitlines()
    return [f.read_bytes() for f in files], [line.split('"seconds"')[0] for line in told]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("alone")
    arguments = [TRAIN, *OPTIONS, "--res_path", str(folder)]
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=ONE_THREAD)
    return outcome(folder)


def test_a_killed_process_brings_a_restart_that_ends_as_if_nothing_had_been(alone, tmp_path):
    run = started(TRAIN, *OPTIONS, "--res_path", str(tmp_path), restarts=2)
    os.kill(after(4, tmp_path, run)[0], signal.SIGKILL)
    os.kill(after(9, tmp_path, run)[1], signal.SIGKILL)
    code, out, _ = ended(run)
    assert code == 0
    assert outcome(tmp_path) == alone
    assert out.count("Saved in") == 1  # one process of two speaks
    assert not list(tmp_path.glob("snapshot*"))


def test_a_signal_ends_all_in_one_line_and_one_process_goes_on(alone, tmp_path):
    run = started(TRAIN, *OPTIONS, "--res_path", str(tmp_path))
    after(4, tmp_path, run)
    began = time.monotonic()
    run.send_signal(signal.SIGTERM)
    code, _, err = ended(run)
    assert code != 0
    assert time.monotonic() - began < 20
    assert err.count("Stopped by SIGTERM.") == 1
    assert err.count("Go on with --resume") == 1
    again = [sys.executable, TRAIN, "--resume", str(tmp_path), "--device", "cpu"]
    subprocess.run(again, check=True, capture_output=True, env=ONE_THREAD)
    assert outcome(tmp_path) == alone


def test_what_one_process_cannot_read_ends_all_with_one_line(tmp_path):
    odd = tmp_path / "odd.py"
    odd.write_text(
        "import os, runpy, sys\n"
        "if os.environ['RANK'] == '1':\n"
        "    sys.argv[sys.argv.index('--data') + 1] += '.missing'\n"
        f"sys.path.insert(0, {str(SCRIPTS)!r})\n"
        f"runpy.run_path({TRAIN!r}, run_name='__main__')\n"
    )
    data = str(SCRIPTS / "data" / "article.jsonl")
    run = started(str(odd), *OPTIONS, "--data", data, "--res_path", str(tmp_path / "run"))
    code, out, err = ended(run)
    assert code != 0
    assert out == ""
    lines = [line for line in err.splitlines() if "article.jsonl.missing" in line]
    assert len(lines) == 1
    assert lines[0].startswith("Process 1: ")
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_taken_is_said_by_torchrun(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = ended(started(TRAIN, "--res_path", str(tmp_path / "run"), port=port))
    assert code != 0
    assert "EADDRINUSE" in err
    assert not (tmp_path / "run").exists()
