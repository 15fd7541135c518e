"""The suite itself: a signal ends a run of it, whatever is being tested then."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse", reason="the scripts need the extra 'scripts'")

ROOT = Path(__file__).parents[1]
TESTS = """
import sys, time

def test_of_a_script(script):
    def body(_):
        print("started", file=sys.__stdout__, flush=True)
        time.sleep(60)
    assert script("cli.guard").guarded(body)([]) in (130, 143)

def test_that_comes_next():
    print("next", file=sys.__stdout__, flush=True)
"""


def test_a_signal_ends_a_run_in_a_script_that_takes_it_for_its_own(heeded, tmp_path):
    file = tmp_path / "test_made_up.py"
    file.write_text(TESTS)
    arguments = ["-s", "-p", "tests.conftest", "-p", "no:cacheprovider", "-c", "pyproject.toml"]
    command = [sys.executable, "-m", "pytest", *arguments, str(file)]
    pipe = {"stdout": subprocess.PIPE, "encoding": "utf-8", "cwd": ROOT}
    runs = {number: subprocess.Popen(command, **pipe) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, run in runs.items():
        while "started" not in run.stdout.readline():
            assert run.poll() is None
        run.send_signal(number)
        out, _ = run.communicate(timeout=60)
        assert run.returncode == 128 + number
        assert f"stopped by {number.name}" in out
        assert "next" not in out
