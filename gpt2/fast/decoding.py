"""How decoders make their steps: as they stand, through torch.compile, or as a CUDA graph.

A GPU waits for the host at every token if the host looks at each, and at every kernel if each is
launched by itself. So there the step is captured once and replayed, and the host looks at the
tokens once a burst.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpt2.fast.compiling import bucket, compiled
from gpt2.fast.devices import has_float64, on_cuda
from gpt2.fast.graphs import GraphedCalls

BURST = 16  # tokens a row that a GPU makes before the host looks whether all rows have ended
GRAPHED = 24  # new tokens from which capturing a CUDA graph of the step saves more than it costs


class Steps:
    """Prompts that are continued, a token a step; all work is on tensors that stay in place.

    A subclass has the last `tokens`, `(B,)`; `_extend`, which takes logits `(B, V)` to the next and
    asks nothing of the device; and `_changed`, the tensors that this changes.

    Args:
        model: a GPT-2 in eval mode; it must stay as it is.
        config: no more than its `max_new_tokens` fit.
        compile: call the model through torch.compile.
    """

    tokens: Tensor

    def __init__(self, model: Any, config: Any, compile: bool) -> None:
        self.model, self.config, self.compile = model, config, compile
        self.device = next(model.parameters()).device
        graphed = on_cuda(self.device) and config.max_new_tokens >= GRAPHED
        self._graphs = GraphedCalls() if graphed else None
        self.fixed = compile or graphed  # every step must have the shapes of the first
        self.burst = BURST if on_cuda(self.device) else 1
        self.draws_on = self.device if has_float64(self.device) else torch.device("cpu")
        self._left = config.max_new_tokens - 1  # asking the device would make the host wait

    def read(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The logits `(B, V)` after the prompts."""
        longest, limit = max(map(len, rows)) + self._left + 1, self.model.config.block_size
        slots = bucket(longest, limit) if self.compile else longest  # few sizes are compiled
        logits, self.cache = self.model.prefill(rows, slots)
        return logits

    @torch.no_grad()
    def step(self) -> None:
        """Add a token to each row; a RuntimeError if all that were asked for are made."""
        if not self._left:
            made = self.config.max_new_tokens
            raise RuntimeError(f"All {made} new tokens that were asked for are made.")
        self._left -= 1
        if self._graphs is None:
            self._step()
        else:
            self._graphs(self._step, self._changed)

    def _step(self) -> Tensor:
        if self.fixed:
            self.cache.widen()
        following = compiled(_next) if self.compile else _next
        return self._extend(following(self.model, self.tokens, self.cache))

    def _extend(self, logits: Tensor) -> Tensor:
        raise NotImplementedError

    def _changed(self) -> list[Tensor]:
        raise NotImplementedError


def _next(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    return model(tokens[:, None], cache=cache)[:, -1]
