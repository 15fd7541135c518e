"""What a run was made of, in a few words each: so that it is gone on with as it was begun."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from hashlib import blake2b

import torch
from torch import Tensor, nn

from gpt2.data.dataset import Dataset
from gpt2.files import listed
from gpt2.model import GPT2
from gpt2.training.config import TrainConfig
from gpt2.training.distributed import whole
from gpt2.training.wrapped import inner

PROBED = 1024  # elements of each tensor that are read one by one, beside the sum of all
FREE = ("sync_every",)  # options that change no result


def of_run(
    model: nn.Module, data: Dataset, config: TrainConfig, validation: Dataset | None
) -> dict[str, str]:
    """Everything that a run is a function of, by name."""
    options = {name: repr(value) for name, value in asdict(config).items() if name not in FREE}
    trained = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    network = inner(model)
    sizes = network.config if isinstance(network, GPT2) else ""  # and attention's dropout
    return {
        **options,
        **of_data(data, validation),
        "base": of_base(model),
        "modules": _digest(f"{model} {sizes}".replace("FSDP", "").encode()),
        "trained parameters": _digest(repr(sorted(trained.items())).encode()),
        "kind of device": next(iter(model.parameters())).device.type,
    }


def of_data(data: Dataset, validation: Dataset | None) -> dict[str, str]:
    """What a run learns and is evaluated on, by name."""
    return {"data": _of(data), "validation data": _of(validation) if validation else "none"}


def of_start(model: nn.Module, data: Dataset, config: TrainConfig, taken: int) -> str:
    """What processes that train together must have alike, in short."""
    digest = blake2b(f"{taken} {config} {_of(data)}".encode(), digest_size=8)
    for name, p in model.named_parameters():
        if p.requires_grad and not hasattr(p, "full_tensor"):
            digest.update(name.encode() + _probe(p.detach()))
    return digest.hexdigest()


def of_base(model: nn.Module) -> str:
    """Names, shapes, some elements and the sum of all bits of what is not trained."""
    frozen = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    frozen |= dict(model.named_buffers())
    digest = blake2b(digest_size=8)
    for name, tensor in sorted(frozen.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_probe(whole(tensor)))
    return digest.hexdigest()


def differences(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What differs, in words; "" for nothing."""
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return listed([f"{n} was {then.get(n, 'not there')}, is {now.get(n, 'gone')}" for n in names])


def _of(data: Dataset) -> str:
    return f"{len(data)} examples, {data.fingerprint[:16]}"


def _probe(tensor: Tensor) -> bytes:
    flat = tensor.contiguous().flatten()
    if not flat.numel():
        return b""
    few = flat[:: -(-flat.numel() // PROBED)]
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(flat.element_size())
    bits = flat.view(whole) if whole else flat.to(torch.int64)
    total = int(bits.sum(dtype=torch.int64))
    return few.contiguous().view(torch.uint8).cpu().numpy().tobytes() + str(total).encode()


def _digest(text: bytes) -> str:
    return blake2b(text, digest_size=8).hexdigest()
