"""What there is to train and to count, and what the base alone holds."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lora.layer import Adapted, EmbeddingUpdate
from lora.tree import survey_adapted, unwrap


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require grad, each once."""
    return [p for p in unwrap(model).parameters() if p.requires_grad]


def parameter_groups(model: nn.Module, lr: float, *, b_ratio: float = 16.0) -> list[dict[str, Any]]:
    """Optimiser groups in which B (of an embedding A) learns `b_ratio` times as fast (LoRA+).

    Args:
        model: a model with adapters.
        lr: learning rate of all else.
        b_ratio: learning rate of B over that of A.

    Returns:
        Groups for a torch optimiser: `[{"params": [...], "lr": lr}, {..., "lr": lr * b_ratio}]`.

    Raises:
        ValueError: a rate or ratio that is not above 0. RuntimeError: no adapter here.

    Source: Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models".
    """
    if not (0 < lr < math.inf and 0 < b_ratio < math.inf):
        raise ValueError(f"lr and b_ratio must be finite and above 0, got {lr} and {b_ratio}.")
    layers = survey_adapted(model).layers.values()
    updates = [update for layer in layers for update in layer.updates.values()]
    faster = {id(u.A if isinstance(u, EmbeddingUpdate) else u.B) for u in updates}
    trainable = trainable_parameters(model)
    return [
        {"params": [p for p in trainable if id(p) not in faster], "lr": lr},
        {"params": [p for p in trainable if id(p) in faster], "lr": lr * b_ratio},
    ]


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has, a shared tensor counted once."""

    trainable: int
    total: int

    def __str__(self) -> str:
        percent = 100 * self.trainable / max(self.total, 1)
        return (
            f"trainable params: {self.trainable:,} || all params: {self.total:,} || "
            f"trainable%: {percent:.4f}"
        )


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count trainable and all parameters; prints as PEFT does."""
    parameters = list(unwrap(model).parameters())
    return ParameterCount(
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
    )


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the base, as if it had never been injected, merged or not."""
    root = unwrap(model)
    modules = root.named_modules(remove_duplicate=False)
    adapted = [path for path, module in modules if isinstance(module, Adapted)]
    prefixes = tuple(f"{path}.updates." if path else "updates." for path in adapted)
    return {key: t for key, t in root.state_dict().items() if not key.startswith(prefixes)}
