"""The processes that torchrun starts: who they are, and how they begin and go on together.

The first prints and writes. `stopping` has how they end.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from . import stopping

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
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    group.init_process_group(
        backend, store=store, rank=number, world_size=count, timeout=timedelta(days=1)
    )
    with stopping.together(store, number), warnings.catch_warnings():
        if number:
            warnings.simplefilter("ignore")
        yield
        _meet()
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


def _meet(error: BaseException | None = None) -> None:
    """Wait for all; raise the error of another process, unless this one has its own."""
    found: list[Any] = [None] * size()
    torch.distributed.all_gather_object(found, None if error is None else str(error))
    faults = [f"Process {i}: {text}" for i, text in enumerate(found) if text is not None]
    if faults and error is None:
        raise ValueError(faults[0])


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
