"""Run functions in several processes that share a process group, and get what each gives.

Processes that were started stay for the next function: a start costs more than most functions.
"""

from __future__ import annotations

import atexit
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SECONDS = 60  # after which what still runs is killed


class Group:
    """So many processes, each of which runs one function after another."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("forkserver")
        preload = ["torch", "gpt2", "lora", "torch.distributed.tensor", __name__]
        context.set_forkserver_preload(preload)
        self.folder = tempfile.TemporaryDirectory()
        place = Path(self.folder.name, "group")
        pipes = [context.Pipe() for _ in range(count)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(theirs, rank, count, place), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()

    def run(self, function: Callable[..., Any], inputs: tuple[Any, ...]) -> list[tuple[bool, Any]]:
        """Of each process whether it is well, and what the function gives."""
        for pipe in self.pipes:
            pipe.send((function, inputs))
        return [_received(pipe) for pipe in self.pipes]

    def end(self) -> None:
        """No process is left."""
        for pipe in self.pipes:
            pipe.close()  # which ends those that wait for a function
        for process in self.processes:
            process.join(5)
            process.kill()
            process.join()
        self.folder.cleanup()


_groups: dict[int, Group] = {}


def together(count: int, function: Callable[..., Any], *inputs: Any) -> list[Any]:
    """What the function gives in each of so many processes; an error is given as its text."""
    if count not in _groups:
        _groups[count] = Group(count)
    found = _groups[count].run(function, inputs)
    if not all(well for well, _ in found):  # the next function gets processes that agree
        _groups.pop(count).end()
    return [given for _, given in found]


@atexit.register
def end() -> None:
    """End all processes; `together` would start others."""
    while _groups:
        _groups.popitem()[1].end()


def _received(pipe: Any) -> tuple[bool, Any]:
    try:
        return pipe.recv() if pipe.poll(SECONDS) else (False, "it ran too long")
    except (EOFError, ConnectionResetError):
        return False, "it died"


def _serve(pipe: Any, rank: int, count: int, place: Path) -> None:
    torch.set_num_threads(1)
    if count > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=place.as_uri(), rank=rank, world_size=count
        )
    while True:
        try:
            function, inputs = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*inputs)))
        except Exception as error:
            traceback.print_exc()
            pipe.send((False, f"{type(error).__name__}: {error}"))
