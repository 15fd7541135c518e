"""The processes that torchrun starts: which one this is, and faults that all of them share.

The first prints and writes.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch


def rank() -> int:
    """Which of the processes this one is; the first is 0."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def size() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def restarts(kind: str = "RESTART_COUNT") -> int:
    """How often torchrun started these processes anew; "MAX_RESTARTS" is how often it would."""
    return int(os.environ.get(f"TORCHELASTIC_{kind}", "0"))


def pick_device(name: str | None) -> str:
    """The device asked for, else the best one here; of several GPUs this process's own."""
    if name is None:
        name = best_device(torch.cuda.is_available(), torch.backends.mps.is_available())
    elif not re.fullmatch(r"cpu|mps|cuda(:\d{1,4})?", name):
        raise ValueError(f"device must be cpu, mps, cuda or cuda:N, got {name!r}.")
    if size() > 1 and name == "cuda":
        number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= count:
            raise ValueError(f"{count} GPUs are here: start as many processes, or --device cpu.")
        torch.cuda.set_device(number)
        name = f"cuda:{number}"
    try:
        torch.empty(1, device=name)
    except Exception as error:  # each backend has its own; torch asserts that it knows CUDA
        raise ValueError(f"device {name!r} cannot be used here: {error}") from None
    return name


def best_device(cuda: bool, mps: bool) -> str:
    """CUDA's GPU before Apple's, and the processor where there is neither."""
    return "cuda" if cuda else "mps" if mps else "cpu"


@contextmanager
def joined() -> Iterator[None]:
    """The processes are a group of torch's within, if there are several."""
    if size() == 1:
        yield
        return
    group: Any = torch.distributed
    shared, number, count = next(group.rendezvous("env://"))
    store = group.PrefixStore(f"start {restarts()}", shared)  # which outlives a restart
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    how = {"store": store, "rank": number, "world_size": count, "timeout": timedelta(days=1)}
    group.init_process_group(backend, **how)
    with warnings.catch_warnings():
        if number:
            warnings.simplefilter("ignore")
        try:
            yield
            _meet()
        except BaseException as error:
            if not number:
                store.set("ended", str((error.code or 0) if isinstance(error, SystemExit) else 1))
            elif not isinstance(error, SystemExit):
                if store.check(["ended"]):  # a connection that closed is no fault of this process
                    raise SystemExit(int(store.get("ended"))) from None
                error.args = (f"Process {number}: {error}",)
            raise
    if torch.cuda.is_available():  # a captured collective would keep the group from ending
        sys.stdout.flush()
        os._exit(0)
    group.destroy_process_group()


@contextmanager
def agreed() -> Iterator[None]:
    """What is within is done by the first process of each host, then by all others.

    Where it fails in one, all end, and the first alone gives the reason.
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


def gathered(value: Any) -> list[Any]:
    """What each process gives, in the order of their numbers."""
    values: list[Any] = [value] * size()
    if size() > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def _meet(error: BaseException | None = None) -> None:
    """Wait for all; where one failed, or showed its help, all end."""
    ends = error if error is None or isinstance(error, SystemExit) else str(error)
    faults = [(n, fault) for n, fault in enumerate(gathered(ends)) if fault is not None]
    if not faults:
        return
    number, fault = faults[0]
    if isinstance(fault, SystemExit):
        raise SystemExit(fault.code)
    if rank():
        raise SystemExit(1)
    if error is None:
        raise ValueError(f"Process {number}: {fault}")
