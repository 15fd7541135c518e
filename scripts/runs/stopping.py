"""How processes that work together end: all, after a signal or a fault, with one line.

Signals reach all of them. The first heeds them where its work can be saved; the others go on until
it has left, since it may wait for them. Whoever is stuck then is ended.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..command import stop_signals

STUCK = 5.0  # seconds after a signal, or a fault, until a process that cannot heed it is ended
LEAVING, ENDED, FAULT = "leaving", "ended", "fault"
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
_ours: list[tuple[Any, int]] = []  # where there are several: what they tell each other by, and who


@contextmanager
def together(store: Any, number: int) -> Iterator[None]:
    """The processes that have this store end together; this one has the number."""
    _ours[:] = [(store, number)]
    with _signals_in_order(is_first=not number):
        try:
            yield
        except BaseException as error:
            leaving()
            if number:
                _follow(error)
            if any(said in str(error) for said in GONE):
                error.args = ("Another process is gone.",)
            if store.check([FAULT]) and (fault := store.get(FAULT).decode()) != str(error):
                error.add_note(fault)
            raise
        finally:
            store.set(ENDED, "")


def leaving() -> None:
    """This process begins to end, and heeds no signal any more; the others wait for the first."""
    if not _ours:
        return
    for heeded in stop_signals():
        signal.signal(heeded, signal.SIG_IGN)
    store, number = _ours[0]
    if not number:
        store.set(LEAVING, "")


def _follow(error: BaseException) -> None:
    """End after the first process, without a word; it may have to be told why."""
    store, number = _ours[0]
    store.set(FAULT, f"Process {number}: {error}" if str(error) else "")
    _wait_for_the_first()
    os._exit(2)


def _wait_for_the_first() -> None:
    if _told(LEAVING, STUCK):  # else it waits for this one, or is dead
        _told(ENDED, 60)


def _told(key: str, seconds: float) -> bool:
    """Whether the key is in the store, within so many seconds."""
    until = time.monotonic() + seconds
    with suppress(RuntimeError):  # the store is gone
        while not _ours[0][0].check([key]):
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
    return True


@contextmanager
def _signals_in_order(*, is_first: bool) -> Iterator[None]:
    """The first process heeds a signal; the others end after it."""
    numbers, heard = stop_signals(), threading.Event()
    before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def heed(number: int, frame: Any) -> None:
        if is_first:
            heard.set()
            leaving()
            if not callable(before[number]):
                raise KeyboardInterrupt
            before[number](number, frame)

    for number in numbers:
        signal.signal(number, heed)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # heard while torch's code runs too
    threading.Thread(target=_watch, args=(reader, heard if is_first else None), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        os.close(writer)


def _watch(reader: int, heard: threading.Event | None) -> None:
    """End this process after a signal that it does not heed itself."""
    if number := os.read(reader, 1):
        if heard is None:
            _wait_for_the_first()
        elif heard.wait(STUCK):
            return
        os._exit(128 + number[0])
