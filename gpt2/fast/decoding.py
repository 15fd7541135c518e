"""A decoder's steps: as they stand, through torch.compile, or as a CUDA graph.

A GPU waits for the host at every token that the host reads, and at every kernel that it launches.
So the step is captured once, and the host reads once a burst.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpt2.fast.compiling import bucket, compiled
from gpt2.fast.devices import has_float64, on_cuda
from gpt2.fast.graphs import GraphedCalls

BURST = 16  # tokens a row on a GPU between two looks whether all rows have ended
GRAPHED = 24  # new tokens from which capturing the step pays


class Steps:
    """Prompts that are continued, a token a step; all work is on tensors that stay in place.

    A subclass has `_begin`, which makes these of the logits `(B, V)` after the prompts; the last
    `tokens`, `(B,)`; and `_extend`, which takes logits to the next and asks nothing of the device.
    """

    tokens: Tensor

    @torch.no_grad()
    def __init__(
        self, model: Any, rows: Sequence[Sequence[int]], config: Any, *, compile: bool = False
    ) -> None:
        self.model, self.config, self.compile = model, config, compile
        self.device = next(model.parameters()).device
        self.integers: Any = {"dtype": torch.long, "device": self.device}
        graphed = on_cuda(self.device) and config.max_new_tokens >= GRAPHED
        self._graphs = GraphedCalls() if graphed else None
        self.fixed = compile or graphed  # every step must have the shapes of the first

        self.burst = BURST if on_cuda(self.device) else 1
        self.draws_on = self.device if has_float64(self.device) else torch.device("cpu")
        longest = max(map(len, rows)) + config.max_new_tokens
        limit = model.config.block_size
        slots = bucket(longest, limit) if compile else longest  # few sizes are compiled
        logits, self.cache = model.prefill(rows, slots)
        self._begin(rows, logits)

    @torch.no_grad()
    def step(self) -> None:
        """Add a token to each row, `max_new_tokens` at most with the first."""
        if self._graphs is None:
            self._step()
        else:
            self._graphs(self._step, self._changed)

    def _step(self) -> Tensor:
        if self.fixed:  # the shapes of every other step: the mask hides the slots not filled
            self.cache.filled = self.cache.slots - 1
        following = compiled(_next) if self.compile else _next
        return self._extend(following(self.model, self.tokens, self.cache))

    def _begin(self, rows: Sequence[Sequence[int]], logits: Tensor) -> None:
        raise NotImplementedError

    def _extend(self, logits: Tensor) -> Tensor:
        raise NotImplementedError

    def _changed(self) -> list[Tensor]:
        """The tensors that a step may write to."""
        tensors = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return [*tensors, self.cache.lengths, *self.cache.layers]


def _next(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    return model(tokens[:, None], cache=cache)[:, -1]
