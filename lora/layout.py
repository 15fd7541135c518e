"""How base layers store their weights and compute with them, so that nothing else has to ask.

An update always speaks of `(out, in)`. `nn.Linear` stores that; Conv1D and `nn.Embedding` (a linear
map of one-hot rows) store `(in, out)`.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call  # pyright: ignore[reportUnknownVariableType]


def out_in_view(base: nn.Module, weight: Tensor) -> Tensor:
    """See a weight in `base`'s layout as `(out, in)`, or an `(out, in)` one in `base`'s layout."""
    return weight.t() if is_fan_in_fan_out(base) else weight


def is_fan_in_fan_out(base: nn.Module) -> bool:
    """Whether the layer stores its weight `(in, out)`: told by its class, never by its shape."""
    return is_conv1d(base) or isinstance(base, nn.Embedding)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's Conv1D, ours or transformers' (not `nn.Conv1d`)."""
    named_so = any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
    return named_so and not isinstance(module, nn.Linear | nn.Embedding)


def is_plain(base: nn.Module) -> bool:
    """Whether the layer computes its class's formula, and not one of its own, such as a scaled one.

    Beside any other forward no update can be added: only the layer's own forward on the weight in
    force is right there. A subclass of `nn.Linear` whose forward computes the same in another way
    says so by `computes_linear = True`.
    """
    kind = type(base)
    if "forward" in vars(base):
        return False
    if vars(kind).get("computes_linear"):
        return True
    return kind.__name__ == "Conv1D" or kind.forward in (nn.Linear.forward, nn.Embedding.forward)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(vars(module)[name] for name in hooks)


def call_with(base: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """The layer's own forward on `x`, with these tensors in the place of its parameters.

    The layer is never written, so that any number of threads may share it.

    Raises:
        RuntimeError: a forward was set on this very layer, which may hold on to its own weight.
    """
    if torch.compiler.is_compiling():  # which traces the replacement instead of making it
        return functional_call(base, tensors, (x,))
    double = type(base).__new__(type(base))
    others = {n: p for n, p in vars(base)["_parameters"].items() if n not in tensors}
    # What Module.compile has made is bound to the base's own weight.
    state: dict[str, Any] = {
        **vars(base),
        "_parameters": others,
        "_compiled_call_impl": None,
        **tensors,
    }
    if "forward" in state:
        if getattr(state["forward"], "__self__", None) is not base:
            raise RuntimeError(
                f"The forward of one {type(base).__name__} was replaced by a function that may use "
                "the weight without the update. Define it in a subclass, or exclude the layer."
            )
        state["forward"] = MethodType(state["forward"].__func__, double)
    vars(double).update(state)
    return double(x)


def why_not_adaptable(module: nn.Module) -> str | None:
    """The reason why a module cannot carry an update, or None if it can."""
    if not (isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(module)):
        return "it is no nn.Linear, Conv1D or nn.Embedding"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm makes it rewrite its weight"
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        return "its weight is no 2-D floating-point parameter"
    return None


def widest_float(device: torch.device) -> torch.dtype:
    """The dtype in which merged weights are computed."""
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
