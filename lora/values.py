"""Which tensors of a file may become parameters."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def why_not_usable(tensor: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """What keeps these from being values of a parameter of this dtype, or None.

    Values are judged as they are and as they will be: 1e300 is finite in float64 only.
    """
    if tensor.dtype not in FLOATS:
        kind = str(tensor.dtype).removeprefix("torch.")
        return f"is {kind}, and only floats of 16, 32 and 64 bits are read and written"
    if tensor.layout != torch.strided:
        return "is sparse, and only dense tensors are read and written"
    if tensor.is_meta:
        return "is on the meta device, which holds no values"
    if not torch.isfinite(tensor).all():
        return "has NaN or infinite values"
    if dtype is not None and not torch.isfinite(tensor.to(dtype)).all():
        kind = str(dtype).removeprefix("torch.")
        return f"has values that are infinite in {kind}: load it with another dtype"
    return None
