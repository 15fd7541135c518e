"""The model that one is given and the GPT-2 in it: wrappers stay in force, flags reach the inside.

Wrappers are torch.compile's, DistributedDataParallel, FSDP, DataParallel and whatever else hands
its inputs on to the one module that it holds.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.loss import summed
from gpt2.model import GPT2

# The names under which wrappers hold what they wrap.
HELD_AS = ("_orig_mod", "module", "_fsdp_wrapped_module")


def inner(model: nn.Module) -> nn.Module:
    """The module within all wrappers; the model itself if it is none."""
    while (held := _held(model)) is not None:
        model = held
    return model


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile is one of the wrappers."""
    held = _held(model)
    return held is not None and ("_orig_mod" in model._modules or is_compiled(held))


def summed_loss(
    model: nn.Module,
    idx: Tensor,
    labels: Tensor,
    documents: Tensor | None = None,
    *,
    longest: int | None = None,
    smoothing: float = 0.0,
    compile: bool = False,
) -> Tensor:
    """The cross-entropy summed over the supervised tokens, a scalar of float32 at least.

    Only the model itself is called: a GPT-2, wrapped or not, for its loss; any other for its
    logits.

    Args:
        model: a GPT-2, with adapters or without; or a module from `(B, T)` ids to logits
            `(B, T, V)`, or to an object with `logits`, as transformers' models give it.
        idx, labels: `(B, T)`; a label is `IGNORE` where nothing is learnt.
        documents, longest: of a GPT-2's one row, as `GPT2.forward` has them.
        smoothing: share of each target that is spread evenly over all tokens.
        compile: of a GPT-2, as `GPT2.forward` has it.

    Raises:
        ValueError: the model gives no logits.
    """
    if isinstance(inner(model), GPT2):
        more: dict[str, Any] = {"smoothing": smoothing} if smoothing else {}
        more |= {"compile": True} if compile else {}
        more |= {} if documents is None else {"documents": documents, "longest": longest}
        return model(idx, labels, **more).sum()  # DataParallel gives a loss for each of its devices
    if documents is not None:
        raise ValueError(f"{type(model).__name__} reads a row as one text: packing takes a GPT-2.")
    return summed(logits_of(model, idx), labels, smoothing)


def logits_of(model: nn.Module, idx: Tensor) -> Tensor:
    """The logits `(B, T, V)` of any model that has some.

    Raises:
        ValueError: it has none.
    """
    out: Any = model(idx)
    found = getattr(out, "logits", out)
    if not (isinstance(found, Tensor) and found.dim() == 3):
        raise ValueError(
            f"{type(model).__name__} gives {type(out).__name__}: what is trained must map (B, T) "
            "token ids to (B, T, V) logits, or to an object that has them as .logits."
        )
    return found


def _held(model: nn.Module) -> nn.Module | None:
    """What a wrapper holds; None for a module that is none, or hands on no second input."""
    for name in HELD_AS:
        if isinstance(held := model._modules.get(name), nn.Module):
            takes_two = name == "_orig_mod" or _takes(model, torch.empty(0), torch.empty(0))
            return held if takes_two else None
    return None


def _takes(model: nn.Module, *inputs: Tensor) -> bool:
    try:
        signature(model.forward).bind(*inputs)
    except TypeError:
        return False
    return True
