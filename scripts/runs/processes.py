"""The processes of torchrun; only the first prints and writes."""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from gpt2.training.distributed import gathered


def rank() -> int:
    """This process's number; the first is 0."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def restarts(kind: str = "RESTART_COUNT") -> int:
    """How often torchrun restarted, or would."""
    return int(os.environ.get(f"TORCHELASTIC_{kind}", "0"))


def pick_device(name: str | None) -> str:
    """The named device, or the best; of several GPUs this process's."""
    if name is None:
        gpus = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name = next((kind for kind, is_here in gpus.items() if is_here), "cpu")
    elif not re.fullmatch(r"cpu|mps|cuda(:\d{1,4})?", name):
        raise ValueError(f"device must be cpu, mps, cuda or cuda:N, got {name!r}.")
    if size() > 1 and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(1, device=name)
        if name.startswith("cuda:"):
            torch.cuda.set_device(name)
    except Exception as error:  # each backend's own
        raise ValueError(f"device {name!r} cannot be used here: {error}") from None
    return name


@contextmanager
def joined() -> Iterator[None]:
    """The process group of torch, if there are several processes."""
    if size() == 1:
        yield
        return
    group: Any = torch.distributed
    shared, number, count = next(group.rendezvous("env://"))
    store = group.PrefixStore(f"start {restarts()}", shared)  # outlives a restart
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    how = {"store": store, "rank": number, "world_size": count, "timeout": timedelta(days=1)}
    group.init_process_group(backend, **how)
    if number:
        warnings.simplefilter("ignore")
    try:
        yield
        _meet()
    except BaseException as error:
        if not number:
            store.set("ended", str((error.code or 0) if isinstance(error, SystemExit) else 1))
        if group.is_initialized() and not torch.cuda.is_available():
            group.destroy_process_group()  # its threads would abort the exit
        if number and not isinstance(error, SystemExit):
            if store.check(["ended"]):
                raise SystemExit(int(store.get("ended"))) from None
            error.args = (f"Process {number}: {error}",)
        raise
    group.destroy_process_group()


@contextmanager
def agreed() -> Iterator[None]:
    """A host's first process goes first; if one fails, all end."""
    if size() == 1:
        yield
        return
    is_first, fault = os.environ["LOCAL_RANK"] == "0", None
    if not is_first:
        _meet()
    try:
        yield
    except (Exception, SystemExit) as error:
        fault = error
    _meet(fault)
    if is_first:
        _meet()


def _meet(error: BaseException | None = None) -> None:
    """Wait for all; if one failed or showed its help, all end."""
    ends = error if error is None or isinstance(error, SystemExit) else str(error)
    faults = [(n, fault) for n, fault in enumerate(gathered(ends)) if fault is not None]
    if not faults:
        return
    torch.distributed.destroy_process_group()
    number, fault = faults[0]
    if isinstance(fault, SystemExit):
        raise SystemExit(fault.code)
    if rank():
        raise SystemExit(1)
    raise error or ValueError(f"Process {number}: {fault}")
