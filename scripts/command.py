"""`lora-gpt2 train|generate|predict|merge|search|report`: the scripts beside this file, anywhere.

Nothing slow is imported here, so that Ctrl-C while torch is loaded ends in one line.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence

SCRIPTS = {
    "train": "train_qa",
    "generate": "generate",
    "predict": "predict",
    "merge": "merge",
    "search": "search",
    "report": "report",
}
USAGE = f"usage: lora-gpt2 {{{','.join(SCRIPTS)}}} ... (each has its own --help), or --version"


def main() -> int:
    """The command that the wheel installs; returns an exit code."""
    verb = "".join(sys.argv[1:2])
    if verb in ("-h", "--help", "--version"):
        print(_version() if verb == "--version" else USAGE)
        return 0
    if verb not in SCRIPTS:
        print(USAGE, file=sys.stderr)
        return 2
    return start(SCRIPTS[verb], sys.argv[2:])


def start(script: str, argv: Sequence[str]) -> int:
    """Import a script, which takes seconds, and call its `main`."""
    for number in stop_signals():
        signal.signal(number, _end)
    try:
        run = importlib.import_module(f"{__package__}.{script}").main
    except ModuleNotFoundError as error:
        if error.name not in ("jsonargparse", "yaml", "rich", "matplotlib"):
            raise
        print(f"{error.name} is missing: pip install 'lora-gpt2[scripts]'.", file=sys.stderr)
        return 2
    return run(argv)


def stop_signals() -> list[signal.Signals]:
    """Ctrl-C, a closed terminal and a plain kill, but for what was ignored, as nohup does."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows knows no SIGHUP
    known = [signal.Signals[name] for name in names if name in signal.Signals.__members__]
    return [number for number in known if signal.getsignal(number) != signal.SIG_IGN]


def stop_line(number: int) -> str:
    """What is said when a signal ends a script."""
    return (
        "Interrupted." if number == signal.SIGINT else f"Stopped by {signal.Signals(number).name}."
    )


def _end(number: int, _: object) -> None:
    # Not by an exception: compiled code that is being imported would turn it into another one.
    os.write(2, f"{stop_line(number)}\n".encode())
    os._exit(128 + number)


def _version() -> str:
    from importlib.metadata import version

    return version("lora-gpt2")
