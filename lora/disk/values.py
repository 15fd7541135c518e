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


def difference(saved: Tensor, base: Tensor) -> str | None:
    """How a tensor of the base in a file differs from the base's own, or None.

    They may be rounded to different dtypes.
    """
    if saved.shape != base.shape:
        return f"is {tuple(saved.shape)}, the base's is {tuple(base.shape)}"
    if reason := why_not_usable(saved):
        return reason
    if base.is_meta:
        return "cannot be compared with the base's, which is on the meta device"
    here = base.detach().cpu()
    if saved.dtype == here.dtype:
        unlike = saved != here
    else:
        slack = max(torch.finfo(t.dtype).eps for t in (saved, here))
        unlike = (saved.double() - here.double()).abs() > slack * here.double().abs() + 1e-7
    if not (count := int(unlike.count_nonzero())):
        return None
    return f"differs from the base's in {count:,} of {unlike.numel():,} values"
