"""What a run was made of, in a few words each."""

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from hashlib import blake2b

import torch
from torch import Tensor, nn

from gpt2.data.dataset import Dataset
from gpt2.files import listed
from gpt2.training.config import TrainConfig
from gpt2.training.distributed import whole
from gpt2.training.step import OPTIONS, Groups

PROBED = 1024  # elements of each tensor that are read one by one, beside the sum of all


def of_run(
    model: nn.Module,
    data: Dataset,
    config: TrainConfig,
    groups: Groups | None,
    validation: Dataset | None,
) -> dict[str, str]:
    """Everything that a run is a function of, by name."""
    trained = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    return {
        **{name: repr(value) for name, value in asdict(config).items()},
        **of_data(data, validation),
        **of_groups(model, groups),
        "base": of_base(model),
        "modules": of_modules(model),
        "trained parameters": _digest(repr(sorted(trained.items()))),
        "kind of device": next(iter(model.parameters())).device.type,
    }


def of_data(data: Dataset, validation: Dataset | None) -> dict[str, str]:
    """What a run learns and is evaluated on, by name."""
    return {"data": _of(data), "validation data": _of(validation) if validation else "none"}


def of_groups(model: nn.Module, groups: Groups | None) -> dict[str, str]:
    """The optimiser's groups, their options in full; nothing where there are none."""
    names = {id(p): name for name, p in model.named_parameters()}
    named: dict[str, str] = {}
    for i, group in enumerate(groups or ()):
        of = _digest(repr([names[id(p)] for p in group["params"]]))
        options = {name: group[name] for name in OPTIONS if name in group}
        named[f"group {i}"] = f"{len(group['params'])} parameters ({of}), {options}"
    return named


def of_start(model: nn.Module, data: Dataset, config: TrainConfig, groups: Groups | None) -> str:
    """What processes that train together must have alike, in short."""
    digest = blake2b(f"{config} {_of(data)} {of_groups(model, groups)}".encode())
    for name, p in model.named_parameters():
        if p.requires_grad and not hasattr(p, "full_tensor"):
            digest.update(name.encode() + _probe(p.detach()))
    return digest.hexdigest()


def of_base(model: nn.Module) -> str:
    """Names, shapes, a few elements and the sum of all bits of what is not trained."""
    frozen = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    frozen |= dict(model.named_buffers())
    digest = blake2b(digest_size=8)
    for name, tensor in sorted(frozen.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_probe(whole(tensor)))
    return digest.hexdigest()


def of_modules(model: nn.Module) -> str:
    """Classes and plain attributes: torch's versions print modules differently."""
    lines: list[str] = []
    for path, module in model.named_modules():
        lines.append(f"{path} {type(module).__name__.replace('FSDP', '')}")
        for name, value in sorted(vars(module).items()):
            weights = isinstance(value, dict) and {*map(type, value.values())} == {float}
            plain = weights or type(value) in (int, float, str) or is_dataclass(value)
            if plain and not name.startswith("_"):
                lines.append(f"{name} {value}")
    return _digest("\n".join(lines))


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


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=8).hexdigest()
