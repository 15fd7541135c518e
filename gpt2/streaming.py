"""A safetensors file of tensors that are held one at a time, as those of a sharded model must be.

What each of several processes has a part of is put together tensor by tensor: all have to take
part, and the first writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

_group: Any = torch.distributed
_KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of it."""
    return hasattr(tensor, "full_tensor")


def is_written_here(tensors: Mapping[str, Tensor]) -> bool:
    """Whether this process is the one that writes them."""
    return not any(map(is_sharded, tensors.values())) or _group.get_rank() == 0


def write(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the file and wait until the disk has it; the same tensors give the same bytes.

    Raises:
        OSError: it cannot be written; what is there of it is of no use.
    """
    names = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
    failed: list[OSError] = []
    with ExitStack() as stack:
        out: IO[bytes] | None = None
        if is_written_here(tensors):
            try:
                out = stack.enter_context(file.open("wb"))
                out.write(_header(names, tensors, metadata))
            except OSError as error:  # the others wait for this process all the same
                failed.append(error)
        for name in names:
            tensor = _whole(tensors[name].detach())
            try:
                if out and not failed:
                    out.write(_bytes(tensor))
            except OSError as error:
                failed.append(error)
        if failed:
            raise failed[0]
        if out:
            out.flush()
            os.fsync(out.fileno())


def _header(names: list[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    at, header = 0, dict[str, Any](__metadata__=dict(metadata))
    for name in names:
        tensor, begins = tensors[name], at
        at += tensor.numel() * tensor.element_size()
        kind = _KINDS[tensor.dtype]
        header[name] = {"dtype": kind, "shape": [*tensor.shape], "data_offsets": [begins, at]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def _bytes(tensor: Tensor) -> Any:
    """In the order of its elements; NumPy knows no bfloat16."""
    flat: Any = tensor.cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()
