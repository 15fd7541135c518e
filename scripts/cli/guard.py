"""How a script ends: bad input in one line, and a signal in one line once the work is saved."""

from __future__ import annotations

import functools
import io
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from jsonargparse import ArgumentError

from ..command import stop_line, stop_signals

Arguments = Sequence[str] | None
LONGEST = 1000  # characters of an error line


class Stopped(KeyboardInterrupt):
    """A signal asks the script to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def guarded(body: Callable[[Arguments], None]) -> Callable[[Arguments], int]:
    """Make the body of a script its `main`, which returns an exit code.

    Bad input gives one line on stderr and 2; Ctrl-C, SIGTERM and SIGHUP give one line and 130, 143
    and 129. The notes of an error, such as where an adapter was saved, stand in the line.
    """

    @functools.wraps(body)
    def main(argv: Arguments = None) -> int:
        try:
            with _stoppable(), _warnings_in_a_line():
                if isinstance(sys.stdout, io.TextIOWrapper):  # which may know no such letter
                    sys.stdout.reconfigure(errors="backslashreplace")
                body(argv)
                sys.stdout.flush()
        except BrokenPipeError as error:  # the reader, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if getattr(error, "__notes__", None):  # in training: what is saved is not all
                return _say(str(error), error, 2)
        except KeyboardInterrupt as stop:
            number = getattr(stop, "number", signal.SIGINT)
            return _say(stop_line(number), stop, 128 + number)
        except (ArgumentError, ValueError, RuntimeError, OSError, MemoryError) as error:
            return _say(_plain(str(error)), error, 2)
        return 0

    return main


@contextmanager
def _stoppable() -> Iterator[None]:
    """Signals raise `Stopped`, once; while what was done is being saved, others change nothing."""
    numbers = stop_signals() if threading.current_thread() is threading.main_thread() else []
    before = {number: signal.getsignal(number) for number in numbers}
    other_errors = sys.unraisablehook

    def stop(number: int, _: object) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    def again(unraisable: sys.UnraisableHookArgs) -> None:
        """Where Python ignores errors, as in a finalizer or about a fork, a stop is put off."""
        if isinstance(error := unraisable.exc_value, Stopped):
            signal.signal(error.number, stop)
            threading.Timer(0.01, os.kill, [os.getpid(), error.number]).start()
        else:
            other_errors(unraisable)

    try:
        sys.unraisablehook = again
        for number in numbers:
            signal.signal(number, stop)
        yield
    finally:
        sys.unraisablehook = other_errors
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """A warning is shown as what it says, without the place in the code that says it."""
    before = warnings.formatwarning

    def plain(message: Warning | str, *_: object, **__: object) -> str:
        return f"{' '.join(str(message).split())}\n"

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = before


def _say(message: str, error: BaseException, code: int) -> int:
    line = " ".join(" ".join([message, *getattr(error, "__notes__", [])]).split())
    line = "".join(letter if letter.isprintable() else "?" for letter in line)
    print(line if len(line) <= LONGEST else line[:LONGEST] + "…", file=sys.stderr)
    return code


def _plain(message: str) -> str:
    """What jsonargparse says of a value, in a sentence; any other message as it is."""
    key = re.match(r'Parser key "(.+?)"', message)
    given = re.search(r"Given value: (.*)", message, re.DOTALL)
    given = given or re.search(r"Got value: (.*)", message, re.DOTALL)
    wanted = re.search(r"Subtypes: \[(.*)\]$", message, re.MULTILINE)
    wanted = wanted or re.search(r"Expected an? (.+?)(?:\. Got value|$)", message, re.MULTILINE)
    if not (key and given and wanted):
        return message
    if "float" in wanted[1] and re.fullmatch(r"[+-]?(nan|inf|infinity)", given[1], re.IGNORECASE):
        return f"{key[1]} must be finite, got {given[1]}."
    kinds = re.sub(r"<class '([\w.]+)'>", r"\1", wanted[1])
    kinds = re.sub(r"\b(?:typing|collections\.abc)\.", "", kinds)
    return f"{key[1]} must be {kinds.replace(', NoneType', ' or null')}, got {given[1]}."
