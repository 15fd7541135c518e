"""Bad data and bad luck in `train_qa.py`: one line says it, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

import gpt2
import lora
from tests.script_runs import (
    MANY,
    VALID,
    assert_trained,
    command,
    rows,
)


@pytest.fixture
def many(tmp_path) -> str:
    file = tmp_path / "many.jsonl"
    file.write_text("\n".join(MANY))
    return str(file)


def test_a_table_without_the_columns_is_one_line(script, quick, tmp_path, capsys):
    file = tmp_path / "data.csv"
    file.write_text("frage,antwort\na,b\n")
    out = ["--res_path", str(tmp_path / "never"), "--data", str(file)]
    for more in ([], ["--cache", str(tmp_path / "cache")], ["--tasks", str(file)]):
        assert script("train_qa").main([*quick, *out, *more]) == 2
        said, error = capsys.readouterr()
        assert (said, error.count("\n")) == ("", 1)
        assert str(file) in error
        assert "wants 'text', or 'question' and 'answer', or" in error
        assert "got ['antwort', 'frage']" in error
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    fields = ["--fields.question", "frage", "--fields.answer", "antwort"]
    assert script("train_qa").main([*quick, *out, *fields]) == 0


@pytest.mark.parametrize("kind", ["--data", "--tasks"])
@pytest.mark.parametrize("packing", [[], ["--packing", "true"]])
def test_a_budget_below_the_longest_example_is_one_line(
    kind, packing, script, quick, tmp_path, capsys, many
):
    budget = ["--tokens_per_batch", "4", *packing, kind, many]
    assert script("train_qa").main([*quick, *budget, "--res_path", str(tmp_path / "never")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "tokens_per_batch is 4 and the longest example has 6 tokens: raise it" in error
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("kind", ["--data", "--tasks"])
@pytest.mark.parametrize("cache", [False, True])
def test_a_share_that_leaves_no_example_is_one_line(
    kind, cache, script, quick, tmp_path, capsys, many
):
    arguments = [*quick, kind, many, "--res_path", str(tmp_path / "never")]
    arguments += ["--cache", str(tmp_path / "cache")] * cache
    for share, which in (("1e-9", "to evaluate on"), ("0.999999999", "to learn")):
        assert script("train_qa").main([*arguments, "--validation", share]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"of 12 examples, taken by a hash of their prompts, leaves none {which}" in error
    assert not (tmp_path / "never").exists()


def test_a_warning_is_a_line_without_its_place(script, capsys):
    def body(_) -> None:
        print(warnings.formatwarning("so  it\nis", UserWarning, "file.py", 3), file=sys.stderr)

    before = warnings.formatwarning
    assert script("cli.guard").guarded(body)([]) == 0
    assert capsys.readouterr().err == "so it is\n\n"
    assert warnings.formatwarning is before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_in_a_run_with_validation_leaves_the_best_and_the_last(
    script, quick, small_base, tmp_path, monkeypatch, capsys, many
):
    folder, out = script("runs.folder"), tmp_path / "run"
    prepare = folder.prepare

    def full(*arguments) -> Path:
        place = prepare(*arguments)
        (place / folder.METRICS).symlink_to("/dev/full")
        return place

    monkeypatch.setattr(folder, "prepare", full)
    arguments = [*quick, *VALID, "--data", many, "--res_path", str(out)]
    assert script("train_qa").main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("[Errno 28] No space left on device The best adapter, of step 0, is")
    assert f"the last, of step 1, in {out / 'last'}. Go on with --resume {out}." in error
    lora.load(gpt2.GPT2.from_pretrained(small_base), out / "adapter")
    assert_trained(out / "last", small_base)
    (out / folder.METRICS).unlink()
    assert script("train_qa").main(["--resume", str(out)]) == 0
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == [1, 2, 3]  # the first one too


@pytest.mark.parametrize("file", ["loss.png", "answers.md", "run.json"])
def test_a_full_disk_after_training_says_where_the_adapter_is(
    file, script, quick, small_base, tmp_path, monkeypatch, capsys, many
):
    real = {"loss.png": ("page.charts", "png"), "answers.md": ("runs.answers", "publish")}
    module, name = real.get(file, ("runs.folder", "write"))

    def full(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "run"
    arguments = [*quick, *VALID, "--data", many, "--res_path", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(script(module), name, full)
        assert script("train_qa").main(arguments) == 2
    error = capsys.readouterr().err
    assert error == f"[Errno 28] No space left on device The trained adapter is in {out}/adapter.\n"
    assert_trained(out / "last", small_base)


def test_packing_that_would_lose_the_attentions_dropout_is_one_line(
    script, quick, tmp_path, many, monkeypatch, capsys
):
    """As on a GPU, whose packed kernel has no dropout."""
    monkeypatch.setattr("gpt2.fast.devices.on_cpu", lambda device: False)
    options = ["--base_dropout", "0.1", "--tokens_per_batch", "30", "--packing", "true"]
    options += ["--epochs", "2", *quick[2:], "--data", many, "--res_path", str(tmp_path / "run")]
    assert script("train_qa").main(options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "load the base with dropout=0" in error


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stop_while_tokens_are_made_leaves_nothing(number, quick, heeded, tmp_path):
    """Ctrl-C goes to all processes of the terminal; none is left, nor is a store half made."""
    file, cache = tmp_path / "data.jsonl", tmp_path / "cache"
    row = {"question": "What is it?", "answer": "It is what it is. " * 20}
    file.write_text((json.dumps(row) + "\n") * 100_000)
    arguments = ["--data", str(file), "--res_path", str(tmp_path / "run"), "--cache", str(cache)]
    started = subprocess.Popen(
        command("train_qa.py", *quick, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )
    while "are written to" not in started.stdout.readline():
        assert started.poll() is None
    time.sleep(0.2)
    if number == signal.SIGINT:
        os.killpg(started.pid, number)
    else:
        started.send_signal(number)
    out, error = started.communicate(timeout=60)
    said = {signal.SIGINT: (130, "Interrupted.\n"), signal.SIGTERM: (143, "Stopped by SIGTERM.\n")}
    assert (started.returncode, error) == said.get(number, (-9, ""))
    assert out == ""
    assert not (tmp_path / "run").exists()
    assert [p.name for p in cache.iterdir() if not p.name.startswith(".")] == []
    if number != signal.SIGKILL:
        assert list(cache.iterdir()) == []
    deadline = time.monotonic() + 20
    while any(_is_of(process, started.pid) for process in Path("/proc").glob("[0-9]*")):
        assert time.monotonic() < deadline, "a process was left"
        time.sleep(0.05)


def _is_of(process: Path, session: int) -> bool:
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return int(fields[3]) == session and fields[0] != "Z"
