"""Running the same work again and again as CUDA graphs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Tensor]
State = Callable[[], list[Tensor]]
WARMUPS = 2  # runs before a capture, in which libraries and caches settle


class GraphedCalls:
    """Calls of one function that are captured once a set of shapes and replayed from then on.

    Nothing of the function is kept: a dropped owner takes the graphs along at once. CUDA refuses
    to destroy one, as a garbage collector would, while another is captured.
    """

    def __init__(self) -> None:
        self.captured: dict[tuple[Any, ...], tuple[Any, tuple[Tensor, ...], Tensor]] = {}
        self.pool: Any = None  # memory that all graphs share, since one runs at a time

    def __call__(self, function: Function, state: State, *inputs: Tensor) -> Tensor:
        """What the function gives for these inputs; it lasts until the next call.

        `state` gives the tensors that it changes: a capture undoes what trial runs did to them;
        those that appear in a trial begin as zeros.
        """
        self.prepare(function, state, *inputs)
        graph, held, output = self.captured[_key(inputs)]
        for slot, value in zip(held, inputs, strict=True):
            slot.copy_(value)
        graph.replay()
        return output

    def prepare(self, function: Function, state: State, *inputs: Tensor) -> None:
        """Capture what a call needs, if it is not yet: trial runs draw random numbers, replays too.

        So a caller who sets the generators does it in between.
        """
        if _key(inputs) in self.captured:
            return

        held = tuple(t.clone() for t in inputs)
        before = [t.clone() for t in state()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                function(*held)
        torch.cuda.current_stream().wait_stream(stream)

        graph = torch.cuda.CUDAGraph()
        # So cuBLAS takes scratch memory from this graph's pool, not from that of an earlier graph,
        # which may be gone before.
        torch._C._cuda_clearCublasWorkspaces()
        with torch.cuda.graph(graph, pool=self.pool):
            output = function(*held)
        torch._C._cuda_clearCublasWorkspaces()
        self.pool = graph.pool()

        after = state()
        with torch.no_grad():
            for tensor, value in zip(after, before, strict=False):
                tensor.copy_(value)
            for tensor in after[len(before) :]:
                tensor.zero_()
        self.captured[_key(inputs)] = graph, held, output


def _key(inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return tuple((*t.shape, t.dtype) for t in inputs)
