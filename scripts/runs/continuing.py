"""What a model says after prompts: some at a time, so that many take no more memory than a few."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

from rich.console import Console

import gpt2

from ..cli import bars

ROWS = {"cpu": 64, "mps": 64}  # rows that are continued at once, on a larger device more


def rows_of(device: str) -> int:
    """How many rows are continued at once by default."""
    return ROWS.get(device, 512)


def continued(
    model: gpt2.GPT2,
    ids: Sequence[list[int]],
    config: gpt2.GenerateConfig,
    rows: int,
    *,
    first: int = 0,
) -> Iterator[list[list[int]]]:
    """What follows the prompts, some of them at a time, so that many take no more memory.

    Prompt i draws with seed + i, in whatever batch it is.

    Args:
        model, ids, config: as for `gpt2.generate`.
        rows: at a time, `num_beams` of them a prompt.
        first: the prompt to begin with.
    """
    at_once = max(1, rows // config.num_beams)
    for start in range(first, len(ids), at_once):
        own = replace(config, seed=config.seed + start)
        yield gpt2.generate(model, ids[start : start + at_once], own)


def tried(
    model: gpt2.GPT2,
    ids: Sequence[list[int]],
    config: gpt2.GenerateConfig,
    console: Console,
) -> list[list[int]]:
    """What follows each prompt, with a bar where it takes more than one batch."""
    found: list[list[int]] = []
    at_once = rows_of(next(model.parameters()).device.type)
    shown = bars.bar(console, "prompts", len(ids)) if len(ids) > at_once else nullcontext()
    with shown as advance:
        for rows in continued(model, ids, config, at_once):
            found += rows
            if advance:
                advance(len(rows), None)
    return found
