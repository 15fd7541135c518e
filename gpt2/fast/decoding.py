"""How a decoder repeats its step: as it stands, through torch.compile, or as a CUDA graph.

A GPU waits for the host at every token if the host looks at each, and at every kernel if each is
launched by itself. So there the step is captured once and replayed, and the host looks at the
tokens once a burst.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpt2.fast.compiling import bucket, compiled
from gpt2.fast.devices import has_float64, on_cuda
from gpt2.fast.graphs import GraphedCalls

BURST = 16  # tokens a row that a GPU makes before the host looks whether all rows have ended
GRAPHED = 24  # new tokens from which capturing a CUDA graph of the step saves more than it costs


class Repeated:
    """A step made so many times on the device, all of whose work is on tensors that stay in place.

    `draws_on` is where random numbers are drawn: on the CPU if the device has no float64.
    """

    def __init__(self, device: torch.device, times: int, compile: bool) -> None:
        graphed = on_cuda(device) and times >= GRAPHED
        self.graphs = GraphedCalls() if graphed else None
        self.compile = compile
        self.fixed = compile or graphed  # every step must have the shapes of the first
        self.burst = BURST if on_cuda(device) else 1
        self.draws_on = device if has_float64(device) else torch.device("cpu")

    def slots(self, longest: int, limit: int) -> int:
        """Cache slots for rows of up to `longest` tokens; few sizes occur if each is compiled."""
        return bucket(longest, limit) if self.compile else longest

    def logits(self, model: Any, tokens: Tensor, cache: Any) -> Tensor:
        """Append one token `(B,)` to each row of the cache: logits `(B, V)` of the next."""
        if self.fixed:
            cache.widen()
        return (compiled(_next) if self.compile else _next)(model, tokens, cache)

    def __call__(self, step: Callable[[], Tensor], state: Callable[[], list[Tensor]]) -> None:
        """Make the step once; `state` gives the tensors that it changes."""
        if self.graphs is None:
            step()
        else:
            self.graphs(step, state)


def _next(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    return model(tokens[:, None], cache=cache)[:, -1]
