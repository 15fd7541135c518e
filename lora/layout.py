"""How base layers store their weights and compute with them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def out_in_view(base: nn.Module, weight: Tensor) -> Tensor:
    """See a weight in `base`'s layout as `(out, in)`, or the other way."""
    return weight.t() if is_fan_in_fan_out(base) else weight


def is_fan_in_fan_out(base: nn.Module) -> bool:
    """Whether the layer stores its weight `(in, out)`: known by its class, never by its shape."""
    return is_conv1d(base) or isinstance(base, nn.Embedding)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's Conv1D, ours or transformers' (not `nn.Conv1d`)."""
    names = {cls.__name__ for cls in type(module).__mro__}
    return "Conv1D" in names and not isinstance(module, nn.Linear | nn.Embedding)


def is_hooked(module: nn.Module) -> bool:
    """Whether a forward was set on the instance, as accelerate and diffusers move weights."""
    return "forward" in vars(module)


def is_plain(base: nn.Module) -> bool:
    """Whether the class computes the formula itself, or says so by `computes_linear = True`."""
    cls = type(base)
    if cls.__name__ == "Conv1D" or vars(cls).get("computes_linear"):
        return True
    return cls.forward in (nn.Linear.forward, nn.Embedding.forward)


@torch.no_grad()
def gain_of(base: nn.Module) -> float:
    """By how much a forward of the class's own scales the formula: 1, or an `embed_scale`."""
    if is_plain(base) or is_hooked(base):
        return 1.0
    weight, bias = base.get_parameter("weight"), getattr(base, "bias", None)
    if isinstance(base, nn.Embedding):
        x = torch.arange(min(len(weight), 64), device=weight.device)
        formula = F.embedding(x, weight)
    else:
        n_in = out_in_view(base, weight).shape[1]
        x = torch.linspace(-1, 1, 3 * n_in, device=weight.device).to(weight.dtype).view(3, n_in)
        formula = F.linear(x, out_in_view(base, weight), bias)
    try:
        y = base(x)
        gain = float((y.double() * formula.double()).sum() / formula.double().square().sum())
        torch.testing.assert_close(y, (gain * formula).to(y.dtype), rtol=0.02, atol=0.02)
    except Exception as error:
        name = type(base).__name__
        raise ValueError(f"{name}.forward is no multiple of its formula (exclude=)") from error
    return gain


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
        return "its weight is no 2-D floating-point parameter (is it quantised?)"
    return None


def widest_float(device: torch.device) -> torch.dtype:
    """The dtype in which merged weights are computed."""
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
