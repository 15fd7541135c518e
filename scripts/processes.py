"""The processes that torchrun starts: the first prints and writes, all end together.

Signals reach all of them. The first heeds them where its work can be saved; the others go on until
it has left, since it may wait for them. Whoever is stuck then is ended.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch

from command import stop_signals

STUCK = 5.0  # seconds after a signal, or a fault, until a process that cannot heed it is ended
LEAVING, ENDED, FAULT = "leaving", "ended", "fault"
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
_store: list[Any] = []  # what processes tell one another by, where there are several
_rounds: list[int] = []  # how often torchrun started them


def rank() -> int:
    """Which of the processes this one is; the first is 0."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def size() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_restart() -> bool:
    """Whether torchrun started these processes in the place of others, of which one died."""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return again or bool(_rounds and _rounds[-1] > 1)


def may_restart() -> bool:
    """Whether torchrun will start others where one dies."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def own_device(device: str) -> str:
    """The device of this process: of several GPUs here, its own.

    Raises:
        ValueError: there are too few.
    """
    if size() == 1 or device != "cuda":
        return device
    number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= there:
        raise ValueError(f"{there} GPUs are here: start as many processes, or pass --device cpu.")
    torch.cuda.set_device(number)
    return f"cuda:{number}"


@contextmanager
def joined() -> Iterator[None]:
    """The processes are a group of torch's within, if there are several."""
    if size() == 1:
        yield
        return
    group: Any = torch.distributed
    shared, number, count = next(group.rendezvous("env://"))
    _rounds.append(_numbered(shared, number, count))
    store = group.PrefixStore(f"round {_rounds[-1]}", shared)
    _store[:] = [store]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    group.init_process_group(
        backend, store=store, rank=number, world_size=count, timeout=timedelta(days=1)
    )
    with _signals_in_order(), warnings.catch_warnings():
        if number:
            warnings.simplefilter("ignore")
        try:
            yield
            _meet()
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
    if torch.cuda.is_available():  # a captured collective would keep the group from ending
        sys.stdout.flush()
        os._exit(0)
    torch.distributed.destroy_process_group()


@contextmanager
def agreed() -> Iterator[None]:
    """What is within is done by the first process of each host, then by all others.

    Where it fails in one, all fail.
    """
    if size() == 1:
        yield
        return
    is_first = os.environ["LOCAL_RANK"] == "0"
    if not is_first:
        _meet()
    try:
        yield
    except (Exception, SystemExit) as error:
        _meet(error)
        raise
    if is_first:
        _meet()
    _meet()


def gathered(own: Any) -> list[Any]:
    """What each process gives, in the order of their numbers."""
    found: list[Any] = [own] * size()
    if size() > 1:
        torch.distributed.all_gather_object(found, own)
    return found


def leaving() -> None:
    """This process begins to end, and heeds no signal any more; the others wait for the first."""
    if not _store:
        return
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)
    if not rank():
        _store[0].set(LEAVING, "")


def _meet(error: BaseException | None = None) -> None:
    """Wait for all; raise the error of another process, unless this one has its own."""
    found: list[Any] = [None] * size()
    torch.distributed.all_gather_object(found, None if error is None else str(error))
    faults = [f"Process {i}: {text}" for i, text in enumerate(found) if text is not None]
    if faults and error is None:
        raise ValueError(faults[0])


def _follow(error: BaseException) -> None:
    """End after the first process, without a word; it may have to be told why."""
    _store[0].set(FAULT, f"Process {rank()}: {error}" if str(error) else "")
    _wait_for_the_first()
    os._exit(2)


def _wait_for_the_first() -> None:
    if _told(LEAVING, STUCK):  # else it waits for this one, or is dead
        _told(ENDED, 60)


def _told(key: str, seconds: float) -> bool:
    """Whether the key is in the store, within so many seconds."""
    until = time.monotonic() + seconds
    with suppress(RuntimeError):  # the store is gone
        while not _store[0].check([key]):
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
    return True


def _numbered(store: Any, number: int, count: int) -> int:
    """How often processes were started with this store: it outlives those that torchrun replaces.

    What the ones before left in it must not be taken for what the others of today say.
    """
    if not number:
        now = store.add("rounds", 1)
        store.set("now", str(now))
        for other in range(1, count):
            store.set(f"{now} welcomes " + store.get(f"{now} is asked by {other}").decode(), "")
        return now
    name = f"{uuid.uuid4()}"
    while True:
        now = int(store.get("now"))
        store.set(f"{now} is asked by {number}", name)
        if store.check([f"{now} welcomes {name}"]):
            return now
        time.sleep(0.02)


@contextmanager
def _signals_in_order() -> Iterator[None]:
    """The first process heeds a signal; the others end after it."""
    numbers, heard = stop_signals(), threading.Event()
    before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def heed(number: int, frame: Any) -> None:
        if not rank():
            heard.set()
            leaving()
            if not callable(before[number]):
                raise KeyboardInterrupt
            before[number](number, frame)

    for number in numbers:
        signal.signal(number, heed)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # heard while torch's code runs too
    threading.Thread(target=_watch, args=(reader, heard), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        os.close(writer)


def _watch(reader: int, heard: threading.Event) -> None:
    """End this process after a signal that it does not heed itself."""
    if number := os.read(reader, 1):
        if rank():
            _wait_for_the_first()
        elif heard.wait(STUCK):
            return
        os._exit(128 + number[0])
