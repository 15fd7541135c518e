"""How a decoder repeats its step: as it stands, through torch.compile, or as a CUDA graph.

A GPU waits for the host at every token if the host looks at every token, and at every kernel if
each is launched by itself. So on a GPU the step is captured once and replayed, and the host looks
at the tokens once a burst. Elsewhere a step is a call, and a burst is one token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpt2.fast.compiling import bucket
from gpt2.fast.devices import can_capture
from gpt2.fast.graphs import GraphedCalls

BURST = 16
"""Tokens a row that a GPU makes before the host looks whether all rows have ended."""
GRAPHED = 24
"""New tokens from which capturing a CUDA graph of the step costs less than it saves."""


def burst(device: torch.device) -> int:
    """Tokens a row to make between two looks of the host."""
    return BURST if can_capture(device) else 1


class Repeated:
    """A step that is made again and again, and does all its work on tensors that stay in place.

    Args:
        device: where those tensors are.
        times: how often the step will be made.
        compile: the step is compiled.

    `fixed` says that every step must have the shapes of the first.
    """

    def __init__(self, device: torch.device, times: int, compile: bool) -> None:
        graphed = can_capture(device) and times >= GRAPHED
        self.graphs = GraphedCalls() if graphed else None
        self.compile = compile
        self.fixed = compile or graphed

    def slots(self, longest: int, limit: int) -> int:
        """Cache slots for rows of up to `longest` tokens; few sizes occur if each is compiled."""
        return bucket(longest, limit) if self.compile else longest

    def __call__(self, step: Callable[[], Tensor], state: Callable[[], list[Tensor]]) -> None:
        """Make the step once.

        Args:
            step: asks nothing of the device; what it returns is not used.
            state: gives the tensors that the step changes.
        """
        if self.graphs is None:
            step()
        else:
            self.graphs(step, state)
