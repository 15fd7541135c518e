"""One GPU against two of one host: a step of an adapter, and of all weights of a sharded model.

python -m benchmarks.distributed --cases "lora;xl" --out results.jsonl
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

import gpt2
from benchmarks import harness, models
from gpt2.training import distributed
from gpt2.training.distributed import shard
from gpt2.training.step import Stepper

CASES = {  # what it is, how the two share a step, and the rows of each
    "lora": ("gpt2 124M, r=8 on c_attn", ("all-reduce", "in order"), 16),
    "xl": ("gpt2-xl, all weights, FSDP2", ("sharded",), 8),
}


def main() -> None:
    a = harness.arguments(__doc__, cases="lora;xl", B=0, T=1024, compile=1, warmup=6)
    for case in a.cases.split(";"):
        compare(a, case)


def compare(a: Any, case: str) -> None:
    """A step of one GPU, and of two in each way that they can share it."""
    about, ways, rows = CASES[case]
    B = a.B or rows
    facts = {"case": about, "B": B, "T": a.T, "compile": bool(a.compile)}
    one = harness.attempt(partial(run, 1, measured, case, ways[0], 1, B, a))
    harness.emit("distributed", a.out, **facts, gpus=1, **one)
    for way in ways:
        two = harness.attempt(partial(run, 2, measured, case, way, 2, B, a))
        if "ms" in one and "ms" in two:
            two["times"] = round(2 * one["ms"]["median"] / two["ms"]["median"], 4)
        harness.emit("distributed", a.out, **facts, gpus=2, how=way, **two)


def measured(case: str, way: str, world: int, B: int, a: Any) -> harness.Facts:
    """Times and memory of one process's steps."""
    stepper = stepper_of(case, way, world, bool(a.compile))
    idx = torch.randint(0, 50000, (B, a.T), generator=torch.Generator().manual_seed(0))
    batches = [gpt2.Batch(idx, idx.clone(), B * (a.T - 1)) for _ in range(world)]
    losses = [float(stepper(batches, step)[0]) for step in range(1, a.warmup + 1)]
    torch.cuda.reset_peak_memory_stats()
    steps = {"step": lambda: stepper(batches, stepper.taken + 1)}
    ms = harness.interleaved(steps, a.repeats, "cuda")["step"]
    weights = sum(map(local_bytes, stepper.parameters.values()))
    moments = sum(map(local_bytes, stepper.state()["moments"].values()))
    return {
        "ms": ms,
        "loss": losses[-1],
        "state_gib": round((2 * weights + moments) / 2**30, 3),  # gradients are as large as weights
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "tokens_per_s_a_gpu": round(B * a.T / ms["median"] * 1e3),
    }


def stepper_of(case: str, way: str, world: int, compile: bool) -> Stepper:
    """What takes a case's steps, of which each process has a micro-batch."""
    how: dict[str, Any] = {"steps": 1, "accumulate": world, "compile": compile}
    if case == "lora":
        model = models.ours("gpt2", "cuda", torch.bfloat16).train()
        distributed.GATHERED_BYTES = 2**28 * (way == "in order")
        config = gpt2.TrainConfig(lr=1e-4, **how)
        return Stepper(model, config)
    model = models.base("gpt2-xl", "cuda", torch.float32).train()
    model = shard(model, torch.bfloat16) if world > 1 else model
    return Stepper(model, gpt2.TrainConfig(lr=1e-5, autocast=True, **how))


def local_bytes(tensor: Any) -> int:
    """Of the part of a tensor that this process holds."""
    part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part.numel() * part.element_size()


def run(world: int, work: Callable[..., Any], *inputs: Any) -> Any:
    """What the first of so many processes, each with its GPU, gives."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(process, (world, folder, work, *inputs), nprocs=world)
        return json.loads(Path(folder, "result").read_text())


def process(rank: int, world: int, folder: str, work: Callable[..., Any], *inputs: Any) -> None:
    """One process: its GPU, the group, the work."""
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.cuda.set_device(rank)
    if world > 1:
        where = {"init_method": f"file://{folder}/group", "rank": rank, "world_size": world}
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl", **where)
    result = work(*inputs)
    if rank == 0:
        Path(folder, "result").write_text(json.dumps(result))
    os._exit(0)  # a captured collective keeps the group from ending


if __name__ == "__main__":
    main()
