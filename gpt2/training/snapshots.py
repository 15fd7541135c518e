"""A run's state on disk, in one file, and what a run is made of.

Tensors are `parameters.NAME`, `moments.KIND.NAME` and `best.NAME`; metadata is a JSON text.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gpt2.data.dataset import Dataset
from gpt2.files import gathered, write_tensors
from gpt2.training.config import OPTIONS, TrainConfig
from gpt2.training.distributed import like, whole

NAME = "snapshot.safetensors"
PART = f".{NAME}.part"
FORMAT = 3
PROBED = 1024  # elements of each tensor that are read one by one, beside the sum of all
KINDS = ("parameters", "moments", "best")  # of tensors
Named = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Where a run is."""

    step: int  # that the weights have taken
    seconds: float  # of training
    parameters: Named  # what is trained
    moments: Named  # AdamW's, by kind and parameter
    best: Named = field(default_factory=dict[str, Tensor])  # parameters of the lowest loss
    evaluated: Mapping[int, float] = field(default_factory=dict[int, float])
    scores: Mapping[int, float] = field(default_factory=dict[int, float])
    record: Mapping[str, Any] = field(default_factory=dict[str, Any])  # the last step's metrics
    made_of: Mapping[str, str] = field(default_factory=dict[str, str])


def write(folder: Path, snapshot: Snapshot) -> None:
    """Write a snapshot; after an OSError those of before are as they were."""
    about = {"format": FORMAT, **vars(snapshot)}
    kinds: dict[str, Named] = {kind: about.pop(kind) for kind in KINDS}
    tensors = {f"{kind}.{n}": t for kind, named in kinds.items() for n, t in named.items()}
    if (all_whole := gathered(tensors)) is None:
        return  # another process writes
    for name in ("evaluated", "scores"):
        about[name] = [*getattr(snapshot, name).items()]
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / PART
    try:
        write_tensors(made, all_whole, {"run": json.dumps(about)})
        os.replace(made, folder / NAME)
    finally:
        made.unlink(missing_ok=True)


def read(folder: Path, parameters: Named | None = None) -> Snapshot:
    """The snapshot in a folder.

    What belongs to a sharded one of these parameters is sharded as it is.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or another version's.
    """
    file, tensors = folder / NAME, dict[str, Any]((kind, {}) for kind in KINDS)
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no snapshot: none was saved there, or the run came to its end."
        )
    opener: Any = safe_open
    try:
        with opener(file, "pt") as opened:
            about: dict[str, Any] = json.loads(opened.metadata()["run"])
            for key in opened.keys():  # noqa: SIM118 - it is no dict
                kind, _, name = key.partition(".")
                of = name.partition(".")[2] if kind == "moments" else name
                tensors[kind][name] = like(opened.get_tensor(key), (parameters or {}).get(of))
        if about.pop("format") != FORMAT:
            raise ValueError("another version wrote it")
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise ValueError(f"{file} cannot be read ({str(error)[:200]}): train anew.") from None
    about |= {name: dict(about.get(name, ())) for name in ("evaluated", "scores")}
    return Snapshot(**about, **tensors)


def remove(folder: Path) -> None:
    for name in (NAME, PART):
        (folder / name).unlink(missing_ok=True)


def made_of(
    model: nn.Module,
    data: Dataset,
    config: TrainConfig,
    groups: Iterable[Mapping[str, Any]],
    validation: Dataset | None = None,
) -> dict[str, str]:
    """Everything that a run is a function of, in a few words by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    made = {name: repr(value) for name, value in asdict(config).items()}

    for name, examples in (("data", data), ("validation data", validation)):
        made[name] = "none"
        if examples is not None:
            made[name] = f"{len(examples)} examples, {examples.fingerprint[:16]}"

    for i, group in enumerate(groups):
        of = _digest(repr([names[id(p)] for p in group["params"]]))
        options = {**group, "lr": group["initial_lr"]}
        changed = {n: options[n] for n in OPTIONS if options[n] != getattr(config, n)}
        made[f"group {i}"] = f"{len(group['params'])} parameters ({of}), {changed}"

    made["base"] = of_base(model)
    made["modules"] = _digest(_described(model))
    made["trained parameters"] = _digest(repr(sorted(shapes.items())))
    made["kind of device"] = next(iter(model.parameters())).device.type
    return made


def of_base(model: nn.Module) -> str:
    """Names, shapes, a few elements and the sum of all bits of what is not trained."""
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    return of_tensors({**frozen, **dict(model.named_buffers())})


def of_tensors(named: Named) -> str:
    """The same of these tensors."""
    digest = blake2b(digest_size=8)
    for name, tensor in sorted(named.items()):
        flat = whole(tensor.detach()).contiguous().flatten()
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        total = flat.view(bits.get(flat.element_size(), torch.uint8)).sum(dtype=torch.int64)
        few = flat[:: max(1, -(-flat.numel() // PROBED))].contiguous().view(torch.uint8)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {int(total)}".encode())
        digest.update(few.cpu().numpy().tobytes())
    return digest.hexdigest()


def _described(model: nn.Module) -> str:
    """Classes and plain attributes: torch's versions print modules differently."""
    lines: list[str] = []
    for path, module in model.named_modules():
        lines.append(f"{path} {type(module).__name__.replace('FSDP', '')}")
        for name, value in sorted(vars(module).items()):
            weights = isinstance(value, dict) and {*map(type, value.values())} == {float}
            plain = weights or type(value) in (int, float, str) or is_dataclass(value)
            if plain and not name.startswith("_"):
                lines.append(f"{name} {value}")
    return "\n".join(lines)


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=8).hexdigest()
