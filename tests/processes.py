"""Run a function in several processes that share a process group, and get what each gives."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SECONDS = 60  # after which what still runs is killed


def together(count: int, function: Callable[..., Any], *inputs: Any) -> list[Any]:
    """What the function gives in each of so many processes; an error is given as its text."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "gpt2", "lora", "torch.distributed.tensor", __name__])
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "group")
        pipes = [context.Pipe(duplex=False) for _ in range(count)]
        processes = [
            context.Process(target=_one, args=(sent, rank, count, place, function, inputs))
            for rank, (_, sent) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for _, sent in pipes:
            sent.close()
        try:
            return [_received(got) for got, _ in pipes]
        finally:
            for process in processes:
                process.join(5)
                process.kill()
                process.join()


def _received(pipe: Any) -> Any:
    try:
        return pipe.recv() if pipe.poll(SECONDS) else "it ran too long"
    except EOFError:
        return "it died"


def _one(
    pipe: Any, rank: int, count: int, place: Path, function: Callable[..., Any], inputs: Any
) -> None:
    torch.set_num_threads(1)
    if count > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=place.as_uri(), rank=rank, world_size=count
        )
    try:
        found = function(*inputs)
    except Exception as error:
        traceback.print_exc()
        found = f"{type(error).__name__}: {error}"
    pipe.send(found)
    if count > 1:
        torch.distributed.destroy_process_group()
