"""Backward runs under the adapter that forward ran under, or says that it does not.

Switching an adapter freezes it, and torch drops the gradient of a frozen parameter without a word.
Checkpointed layers run again in the backward pass, then under whatever is in force; of re-entrant
checkpoints the last forward pass alone is known. Compiled code is not watched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from lora.untyped import in_backward, in_transform, on_gradient

_ADVICE = "Call backward inside the context, or before the switch."


class Vigil:
    """What one adapted layer last ran under."""

    def __init__(self) -> None:
        self.under: tuple[object, ...] = ()

    def begin(self, enabled: bool, unmerged: bool, active: object, routing: object) -> None:
        """Note what a forward pass runs under; inside a backward pass it must be the same.

        Raises:
            RuntimeError: a checkpointed layer runs again under another adapter.
        """
        if torch.compiler.is_compiling():
            return
        # Not the routing itself, whose tensors would live on.
        state = (enabled, unmerged, active, id(routing))
        if not in_backward():
            self.under = state
        elif self.under != state:
            raise RuntimeError(
                f"A checkpointed layer runs again under another adapter than before. {_ADVICE}"
            )

    def over(self, y: Tensor, updates: nn.Module) -> Tensor:
        """`y`, whose backward pass raises where a factor that trains now trains no more then."""
        if torch.compiler.is_compiling() or in_transform():
            return y
        # A layer with a forward of its own may return several tensors, as routers do.
        parts = [t for t in (y if isinstance(cast(object, y), tuple) else (y,)) if t.requires_grad]
        trained = [p for p in updates.parameters() if p.requires_grad] if parts else []
        for part in parts if trained else ():
            on_gradient(part, _watch(trained))
        return y


def _watch(trained: list[nn.Parameter]) -> Callable[[Tensor], None]:
    def check(_: Tensor) -> None:
        if not all(p.requires_grad for p in trained):
            raise RuntimeError(
                f"A gradient comes to an adapter that was switched off after the loss was made. "
                f"{_ADVICE}"
            )

    return check
