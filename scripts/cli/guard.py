"""How a script starts and ends: an error or a signal is one line."""

import functools
import importlib
import io
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Arguments = list[str] | None
NAMES = ("train_qa", "generate", "predict", "merge", "export", "search", "report")
VERBS = {name.partition("_")[0]: name for name in NAMES}  # of lora-gpt2


class Stopped(KeyboardInterrupt):
    """A signal, `args[0]`, asks the script to end."""


def start(script: str, argv: list[str]) -> int:
    """Import a script and call its `main`."""
    # torch reads it at import: beside other work, a thread that waits soon sleeps.
    if "OMP_WAIT_POLICY" not in os.environ and _is_busy():
        os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
    for number in _stop_signals():
        signal.signal(number, _end)
    try:
        main = importlib.import_module(f"{__name__.partition('.')[0]}.{script}").main
    except ModuleNotFoundError as error:
        if error.name not in ("jinja2", "jsonargparse", "yaml", "rich", "matplotlib"):
            raise
        print(f"{error.name} is missing: pip install 'lora-gpt2[scripts]'.", file=sys.stderr)
        return 2
    return main(argv)


def guarded(body: Callable[[Arguments], None]) -> Callable[[Arguments], int]:
    """A `main` that returns 0, 2, or 128 + signal."""

    @functools.wraps(body)
    def main(argv: Arguments = None) -> int:
        words = list(sys.argv[1:] if argv is None else argv)
        try:
            with _set_up():
                if isinstance(sys.stdout, io.TextIOWrapper):
                    sys.stdout.reconfigure(errors="backslashreplace")
                body([word for word in words if word != "--debug"])
                sys.stdout.flush()
        except BrokenPipeError as error:  # as by `head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if getattr(error, "__notes__", None):  # in training
                return _print(str(error), error, 2)
        except KeyboardInterrupt as stop:
            number = stop.args[0] if isinstance(stop, Stopped) else signal.SIGINT
            return _print(_stop_line(number), stop, 128 + number)
        except (ValueError, RuntimeError, OSError, MemoryError) as error:
            if "--debug" in words:
                traceback.print_exc()
            return _print(str(error), error, 2)
        return 0

    return main


def _is_busy() -> bool:
    """Whether others run now; True where the system does not say."""
    load = Path("/proc/loadavg")
    for _ in range(3 * load.is_file()):  # a daemon runs for a moment
        if load.read_text().split()[3].startswith("1/"):
            return False
        time.sleep(0.01)
    return True


def _stop_signals() -> list[signal.Signals]:
    """Those not ignored, as nohup does."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def _stop_line(number: int) -> str:
    by = f"Stopped by {signal.Signals(number).name}."
    return "Interrupted." if number == signal.SIGINT else by


def _end(number: int, _: object) -> None:
    # No exception: compiled code being imported would change it.
    os.write(2, f"{_stop_line(number)}\n".encode())
    os._exit(128 + number)


@contextmanager
def _set_up() -> Iterator[None]:
    """A signal raises `Stopped`, a second Ctrl-C kills; a warning is a line."""
    # Only process 0 heeds signals: it saves, and the others end with it.
    # Under torchrun a Ctrl-C comes twice.
    numbers = _stop_signals() if threading.current_thread() is threading.main_thread() else []
    before = {number: signal.getsignal(number) for number in numbers}
    other_errors, form = sys.unraisablehook, warnings.formatwarning
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    heeds = os.environ.get("RANK", "0") == "0"

    def stop(number: int, _: object) -> None:
        for other in numbers:
            ends = other == number == signal.SIGINT and not torchrun
            signal.signal(other, signal.SIG_DFL if ends else signal.SIG_IGN)
        raise Stopped(number)

    def end(unraisable: "sys.UnraisableHookArgs") -> None:
        """End where Python ignores errors (finalizers)."""
        if isinstance(error := unraisable.exc_value, Stopped):
            _end(error.args[0], None)
        other_errors(unraisable)

    try:
        sys.unraisablehook = end
        warnings.formatwarning = lambda message, *_, **__: f"{' '.join(str(message).split())}\n"
        for number in numbers:
            signal.signal(number, stop if heeds else signal.SIG_IGN)
        yield
    finally:
        sys.unraisablehook, warnings.formatwarning = other_errors, form
        for number, handler in before.items():
            signal.signal(number, handler)


def _print(message: str, error: BaseException, code: int) -> int:
    line = " ".join(" ".join([message, *getattr(error, "__notes__", [])]).split())
    line = "".join(letter if letter.isprintable() else "?" for letter in line)
    print(line if len(line) <= 1000 else line[:1000] + "…", file=sys.stderr)
    return code
