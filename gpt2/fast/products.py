"""The product with a weight, in the form that a device's matrix library is fastest at."""

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2.fast.devices import on_cpu, on_cuda

WHOLE = 2**18  # elements of a weight up to which one product is as fast as slices
# Rows between which a GPU makes the head's logits three times as fast as (V, rows): V is odd.
FEW_ROWS = range(3, 65)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + bias` as `F.linear`, from `(…, in)` to `(…, out)`.

    MKL gives a batch of small products to more threads than a single one with few rows.
    """
    n_out = weight.shape[0]
    if bias is None and n_out % 8 and on_cuda(x.device) and x[..., 0].numel() in FEW_ROWS:
        return (weight @ x.flatten(0, -2).t()).t().reshape(*x.shape[:-1], -1)
    slices = torch.get_num_threads() if weight.numel() > WHOLE and _pays(x) else 1
    sliced = n_out // slices * slices
    if slices == 1 or sliced == 0:
        return F.linear(x, weight, bias)

    rows = x.reshape(-1, x.shape[-1])
    cut = weight[:sliced].view(slices, -1, weight.shape[1]).mT  # (slices, in, sliced / slices)
    y = (rows.expand(slices, *rows.shape) @ cut).transpose(0, 1).flatten(1)
    if sliced < n_out:
        y = torch.cat([y, rows @ weight[sliced:].t()], 1)
    y = y.view(*x.shape[:-1], n_out)
    return y if bias is None else y + bias


def _pays(x: Tensor) -> bool:
    by_mkl = on_cpu(x.device) and x.dtype == torch.float32 and torch.backends.mkl.is_available()
    return by_mkl and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
