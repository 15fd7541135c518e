"""A large file of JSON lines, encoded by several processes: each takes every n-th part of it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gpt2.data.encoding import Block, Encoder, Options, blocks, check, checked, encoded
from gpt2.data.examples import (
    SHOWN,
    Faults,
    Fields,
    check_fields,
    example_of,
    good,
    stream_examples,
)
from gpt2.data.held_out import ALL, Range, check_side, is_within, within
from gpt2.data.rows import json_part

PART = 2**20  # bytes that are read and encoded at once
PROCESSES = 16  # at most


@dataclass(frozen=True)
class Work:
    """What is to be encoded, and how; arguments as for `open_data`."""

    path: Path
    fields: Fields | None
    tokenizer: Encoder
    options: Options
    side: Range = ALL


@dataclass
class _Part:
    block: Block
    faults: Faults
    lines: int


def encoded_file(work: Work) -> Generator[Block]:
    """The blocks of a file in order; errors as `stream_examples`, `within` and `encode`."""
    count = min(_processors(), PROCESSES, work.path.stat().st_size // PART)
    if work.path.suffix.lower() != ".jsonl" or count < 2:
        examples = within(stream_examples(work.path, work.fields), work.side)
        return blocks(examples, work.tokenizer, work.options)
    check(work.tokenizer, work.options)
    check_fields(work.fields, complete=True)
    return checked(_by_processes(work, count), work.options)


def _processors() -> int:
    """How many processors this process may use; 1 where it cannot be forked with its threads."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def _by_processes(work: Work, count: int) -> Iterator[Block]:
    fork: Any = multiprocessing.get_context("fork")
    pipes: list[tuple[Connection, Connection]] = [fork.Pipe(duplex=False) for _ in range(count)]
    ours = [reader for reader, _ in pipes]
    workers = [
        fork.Process(target=_work, args=(work, i, ours, writer), daemon=True)
        for i, (_, writer) in enumerate(pipes)
    ]
    try:
        with warnings.catch_warnings():  # of threads, none of which the new processes need
            warnings.simplefilter("ignore", DeprecationWarning)
            for worker in workers:
                worker.start()
        for _, writer in pipes:
            writer.close()
        yield from _joined(work, ours)
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.kill()  # it may still heed signals as this process does
                worker.join()
        for pipe in (end for pair in pipes for end in pair):
            pipe.close()


def _joined(work: Work, pipes: list[Connection]) -> Iterator[Block]:
    """The parts' blocks in order; then the faults of all."""
    faults, lines, kept, size = Faults(), 0, 0, work.path.stat().st_size
    for i, begin in enumerate(range(0, size, PART)):
        try:
            part = pipes[i % len(pipes)].recv()
        except EOFError:
            raise RuntimeError(
                f"A process that reads {work.path} was ended from outside, perhaps for want of "
                "memory: run again."
            ) from None
        if isinstance(part, Exception):
            raise part
        told = [(f"{work.path}:{lines + int(n)}", said) for n, said in part.faults.told]
        faults.told += told[: SHOWN - len(faults.told)]
        faults.left_out += part.faults.left_out
        faults.found += part.faults.found
        lines += part.lines
        kept += len(part.block.lengths)
        if len(part.block.lengths):
            yield replace(part.block, reached=min(1.0, (begin + PART) / size))
    faults.check(work.path)
    check_side(faults.found, kept, work.side)


def _work(work: Work, first: int, others: list[Connection], pipe: Connection) -> None:
    """Encode parts and send them, until all are sent or nobody is there to receive them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    for reader in others:
        reader.close()
    try:
        for begin in range(first * PART, work.path.stat().st_size, len(others) * PART):
            pipe.send(_part(work, begin))
    except BrokenPipeError:
        return
    except Exception as error:
        pipe.send(error)


def _part(work: Work, begin: int) -> _Part:
    rows, lines = json_part(work.path, begin, begin + PART)
    faults = Faults()
    examples = good(rows, faults, lambda row: example_of(row, work.fields))
    texts = [
        text
        for example in examples
        if work.side == ALL or is_within(example, work.side)
        for text in (example.prompt, example.completion)
    ]
    block = encoded(texts, work.tokenizer, work.options)
    block.hashes  # noqa: B018 - made here, where several processes do it
    return _Part(block, faults, lines)
