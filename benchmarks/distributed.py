"""One GPU against two of one host: a step of an adapter, of all weights, and of a sharded model.

python -m benchmarks.distributed --cases "lora;full;xl" --out results.jsonl
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import nn
from torch.multiprocessing.spawn import spawn

import gpt2
from benchmarks import harness, models
from gpt2.data.batches import Batch
from gpt2.training.distributed import shard
from gpt2.training.step import Stepper

ORDER = {"all-reduce": False, "in order": True}


def adapter(how: str, world: int, B: int, T: int, compile: bool) -> Stepper:
    """124M, r=8 on c_attn, bfloat16."""
    model = models.ours("gpt2", "cuda", torch.bfloat16)
    config = gpt2.TrainConfig(
        steps=1, lr=1e-4, accumulate=world, compile=compile, in_order=ORDER[how]
    )
    return Stepper(model.train(), config)


def whole(how: str, world: int, B: int, T: int, compile: bool) -> Stepper:
    """124M, all weights in float32, computed with in bfloat16."""
    return Stepper(*_full("gpt2", world, compile, in_order=False))


def xl(how: str, world: int, B: int, T: int, compile: bool) -> Stepper:
    """gpt2-xl, all weights, sharded where there are several processes."""
    model, config = _full("gpt2-xl", world, compile)
    return Stepper(shard(model, torch.bfloat16) if world > 1 else model, config)


def _full(size: str, world: int, compile: bool, **how: Any) -> tuple[gpt2.GPT2, gpt2.TrainConfig]:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = gpt2.GPT2(gpt2.SIZES[size])
    config = gpt2.TrainConfig(
        steps=1, lr=1e-5, accumulate=world, autocast=True, compile=compile, **how
    )
    return model.train(), config


CASES: dict[str, tuple[Callable[..., Stepper], str, tuple[str, ...], int]] = {
    "lora": (adapter, "gpt2 124M, r=8 on c_attn", ("all-reduce", "in order"), 16),
    "full": (whole, "gpt2 124M, all weights", ("all-reduce",), 16),
    "xl": (xl, "gpt2-xl, all weights, FSDP2", ("sharded",), 8),
}


def measured(case: str, how: str, world: int, a: Any) -> dict[str, Any]:
    """Times and memory of one process's steps."""
    build, _, _, usual = CASES[case]
    B = a.B or usual
    stepper = build(how, world, B, a.T, bool(a.compile))
    held: list[int] = []
    hook = stepper.optimizer.register_step_pre_hook(
        lambda *_: held.append(torch.cuda.memory_allocated())
    )
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(0, 50000, (B, a.T), generator=generator)
    batches = [Batch(idx, idx.clone(), B * (a.T - 1)) for _ in range(world)]
    numbers = iter(range(1, 10**6))
    loss = 0.0
    for _ in range(a.warmup):
        loss = float(stepper(batches, next(numbers))[0])
    hook.remove()
    torch.cuda.reset_peak_memory_stats()
    times = harness.interleaved(
        {"step": lambda: stepper(batches, next(numbers))}, a.repeats, "cuda"
    )
    trained = list(stepper.parameters.values())
    moments = sum(_local(t) for t in stepper.state().moments.values())
    return {
        "ms": times["step"],
        "loss": loss,
        "at_update_gib": round(held[-1] / 2**30, 3),
        "state_gib": round((2 * sum(map(_local, trained)) + moments) / 2**30, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "tokens_per_s_a_gpu": round(B * a.T / times["step"]["median"] * 1e3),
    }


def _local(tensor: Any) -> int:
    own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own.numel() * own.element_size()


def process(
    rank: int, world: int, place: str, pipe: Any, work: Callable[..., Any], *inputs: Any
) -> None:
    """One process: its GPU, the group, the work; the first gives what it found."""
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.cuda.set_device(rank)
    if world > 1:
        where = {"init_method": f"file://{place}", "rank": rank, "world_size": world}
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl", **where)
    try:
        found = work(*inputs)
    except Exception as error:  # a case that cannot run is a result too
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    if rank == 0:
        pipe.put(found)
        pipe.close()
        pipe.join_thread()
    os._exit(0)  # a captured collective keeps the group from ending


def run(world: int, work: Callable[..., Any], *inputs: Any) -> Any:
    """What the first of so many processes found."""
    context = mp.get_context("spawn")
    pipe: Any = context.Queue()
    place = str(Path(tempfile.mkdtemp(), "group"))
    started: Any = spawn(process, (world, place, pipe, work, *inputs), nprocs=world, join=False)
    try:
        return pipe.get(timeout=240)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: no answer"}
    finally:
        for one in started.processes:
            one.join(10)
            one.kill()


class Letters:
    eos = 60

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]


WAYS: dict[str, dict[str, Any]] = {
    "eager, in order": {"cuda_graph": False, "in_order": True},
    "eager, all-reduce": {"cuda_graph": False, "in_order": False},
    "compiled, in order": {"in_order": True, "compile": True},
    "sharded": {},
    "sharded, compiled": {"compile": True},
}


def checked(world: int, way: str) -> Any:
    """Losses and norms of two epochs and a half, whose last step lacks a micro-batch."""
    sizes = gpt2.GPT2Config(n_layer=2, n_head=2, n_embd=128, block_size=64, vocab_size=64)
    dry = dataclasses.replace(sizes, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    torch.manual_seed(0)
    model: nn.Module = gpt2.GPT2(dry).to("cuda")
    texts = ["abc", "hello", "lowrank" * 5, "at", "updates", "beside", "weights"]
    data = gpt2.encode(texts, Letters())
    model = shard(model) if world > 1 and way.startswith("sharded") else model
    config = gpt2.TrainConfig(steps=10, lr=1e-3, accumulate=2, **(WAYS[way] if world > 1 else {}))
    told = [(r.loss, r.grad_norm) for r in gpt2.train(model, data, config)]
    return [*told, (gpt2.evaluate(model, data, batch_size=2).loss, 0.0)]


def main() -> None:
    a = harness.arguments(__doc__, cases="check;lora;full;xl", B=0, T=1024, compile=1, warmup=6)
    for case in a.cases.split(";"):
        if case == "check":
            want = run(1, checked, 1, "eager, in order")
            with ThreadPoolExecutor() as pool:
                found = list(pool.map(lambda way: run(2, checked, 2, way), WAYS))
            for way, got in zip(WAYS, found, strict=True):
                apart = got if "failed" in got else _apart(want, got)
                harness.emit("distributed", a.out, case="2 GPUs as 1", way=way, apart=apart)
            continue
        _, about, ways, usual = CASES[case]
        one: dict[str, Any] = run(1, measured, case, ways[0], 1, a)
        facts = {"case": about, "B": a.B or usual, "T": a.T, "compile": bool(a.compile)}
        harness.emit("distributed", a.out, **facts, gpus=1, **one)
        for how in ways:
            two: dict[str, Any] = run(2, measured, case, how, 2, a)
            if "ms" in one and "ms" in two:
                share = one["ms"]["median"] / two["ms"]["median"]
                two |= {"tokens_a_gpu_over_one": round(share, 4), "times": round(2 * share, 4)}
                two["state_over_one"] = round(two["at_update_gib"] / one["at_update_gib"], 4)
            harness.emit("distributed", a.out, **facts, gpus=2, how=how, **two)


def _apart(want: Any, got: Any) -> float | str:
    if isinstance(want, dict) or len(want) != len(got):
        return f"{want} and {got}"[:300]
    pairs = [
        (x, y)
        for row, other in zip(want, got, strict=True)
        for x, y in zip(row, other, strict=True)
    ]
    return max(abs(x - y) / max(abs(x), 1e-3) for x, y in pairs)


if __name__ == "__main__":
    main()
