"""The layers of GPT-2 that are not torch's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpt2.fast import head
from gpt2.fast.attention import Drops
from gpt2.fast.dropout import drop
from gpt2.fast.products import linear


class Conv1D(nn.Module):
    """A linear layer whose weight is stored `(in, out)`, as the published GPT-2 stores it.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.

    `slices` names the equal parts of the output, where several projections lie side by side.
    """

    slices: tuple[str, ...] = ()

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(…, in)` to `(…, out)`: `x W + b`."""
        return linear(x, self.weight.t(), self.bias)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return "in_features={}, out_features={}".format(*self.weight.shape)


class Dropout(nn.Dropout):
    """Zeros at random in training mode, and the rest scaled up so that the mean stays.

    `drops` drops instead of torch's own random numbers where a population's step has set it.
    """

    drops: Drops | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Map `(…)` to `(…)`."""
        if not (self.training and self.p):
            return input
        return drop(input, self.p)[0] if self.drops is None else self.drops(input, self.p)


class LMHead(nn.Linear):
    """The map from hidden states to logits: `x Wᵀ`."""

    computes_linear = True  # so that others may take it for the nn.Linear that it is

    def forward(self, input: Tensor) -> Tensor:
        """Map `(…, C)` to `(…, V)`."""
        return head.logits(input, self.weight)
