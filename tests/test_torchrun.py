"""`torchrun scripts/train_qa.py`, as a user starts it: killed, stopped, with fewer processes.

With LONG in the environment there are more cases, which take longer.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from gpt2.training import snapshots
from tests.processes import end, together
from tests.script_runs import QUICK, SCRIPTS, two_processes

if not Path("/proc/self/task").is_dir():
    pytest.skip("the tests look for child processes in /proc", allow_module_level=True)

long = pytest.mark.skipif("LONG" not in os.environ, reason="it is slow: set LONG=1")
TRAIN = str(SCRIPTS / "train_qa.py")
STEPS = 15
OPTIONS = [*QUICK, "--steps", str(STEPS), "--accumulate", "2", "--validation"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # as torchrun has it: sums are in its order
OPTIONS += ["0.4", "--save_every", "2", "--train_batch_size", "1", "--device", "cpu"]


def started(*argv: str, how: Sequence[str] = ("--standalone", "--nproc_per_node=2")) -> Any:
    """A torchrun, in a process group of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", *how, *argv]
    pipes: Any = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, **pipes, text=True, env=ONE_THREAD, start_new_session=True)


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


def trained(*argv: str) -> int:
    """The script in this process alone."""
    return importlib.import_module("scripts.train_qa").main(argv)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("alone")
    assert together(1, trained, *OPTIONS, "--res_path", str(folder)) == [0]
    yield outcome(folder)
    end()


@pytest.mark.parametrize(
    "killed", [(0,), pytest.param((0, 1), marks=long)], ids=["the first", "each in turn"]
)
def test_a_killed_process_brings_a_restart_that_ends_as_if_nothing_had_been(
    killed, alone, tmp_path
):
    how = ("--standalone", "--nproc_per_node=2", "--max_restarts=2")
    run = started(TRAIN, *OPTIONS, "--res_path", str(tmp_path), how=how)
    for step, number in zip((4, 9), killed, strict=False):
        os.kill(after(step, tmp_path, run)[number], signal.SIGKILL)
    code, out, _ = ended(run)
    assert code == 0
    assert outcome(tmp_path) == alone
    assert out.count("Saved in") == 1  # one process of two speaks
    assert not list(tmp_path.glob("snapshot*"))


@pytest.mark.parametrize(
    ("to", "number", "said"),
    [
        (os.kill, signal.SIGTERM, "Stopped by SIGTERM."),
        pytest.param(os.killpg, signal.SIGINT, "Interrupted.", marks=long),  # as Ctrl-C sends it
    ],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_a_signal_ends_all_in_one_line_and_one_process_goes_on(
    to, number, said, heeded, alone, tmp_path
):
    run = started(TRAIN, *OPTIONS, "--res_path", str(tmp_path))
    after(4, tmp_path, run)
    began = time.monotonic()
    to(run.pid, number)
    code, _, err = ended(run)
    assert code == 1  # torchrun's
    assert time.monotonic() - began < 20
    assert err.count(said) == 1
    assert err.count("Go on with --resume") == 1
    kept = snapshots.read(tmp_path)
    assert f"the last, of step {kept.step}, in" in err
    assert not list(tmp_path.rglob("*.part"))
    resume = ("--resume", str(tmp_path), "--device", "cpu")
    assert together(1, trained, *resume) == [0]
    assert outcome(tmp_path) == alone


@long
def test_two_hosts_give_what_one_process_gives(alone, tmp_path):
    """Two torchruns that know one another by a port: the first process of each has LOCAL_RANK 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]
    arguments = [TRAIN, *OPTIONS, "--res_path", str(tmp_path)]
    hosts = [started(*arguments, how=[*where, f"--node_rank={number}"]) for number in (0, 1)]
    try:
        (code, out, _), (other, *rest) = map(ended, hosts)
    finally:
        hosts[1].kill()  # where the first did not end in time
    assert (code, other) == (0, 0)
    assert out.count("Saved in") == 1
    assert rest[0] == ""
    assert outcome(tmp_path) == alone


def test_what_one_process_cannot_read_ends_all_with_one_line(tmp_path):
    how = [*OPTIONS, "--res_path", str(tmp_path / "run")]
    (code, out, error), *others = two_processes(
        "train_qa.py", *how, second=("--data", "missing.jsonl")
    )
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith("Process 1: [Errno 2] No such file or directory: 'missing.jsonl'")
    assert others == [(1, "", "")]
    assert not (tmp_path / "run").exists()


def test_help_is_shown_once_and_is_no_fault():
    (code, out, error), *others = two_processes("train_qa.py", "--help")
    assert (code, out.count("usage: train_qa.py"), error) == (0, 1, "")
    assert others == [(0, "", "")]
