"""Whether this model can read this data and be trained so: said before anything is done."""

from __future__ import annotations

from typing import Any

from torch import nn

from gpt2.data.dataset import Dataset
from gpt2.fast import devices
from gpt2.model import GPT2
from gpt2.training import distributed
from gpt2.training.config import TrainConfig
from gpt2.training.groups import Groups, grouped
from gpt2.training.wrapped import inner, is_compiled


def check_readable(model: nn.Module, data: Dataset) -> None:
    """Find out whether the model can be called on the data.

    Raises:
        ValueError: it is no module, the data no `Dataset`, empty, too long for the model, or of
            another vocabulary.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}.")
    if not isinstance(data, Dataset):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            f"data must be a gpt2.Dataset, got {type(data).__name__}: make one of texts with "
            "gpt2.encode(texts, tokenizer), and of a file with "
            "gpt2.encode(gpt2.read_examples(file), tokenizer)."
        )
    if not len(data):
        raise ValueError("There is no example in the data.")
    if data.unlearnable:
        raise ValueError(f"{data.unlearnable}. Leave them out.")
    network = inner(model)
    if isinstance(network, GPT2):
        longest, limit = data.longest, network.config.block_size
        if longest > limit:
            raise ValueError(
                f"An example has {longest} tokens and the model's context takes {limit}: "
                f"encode the data with max_length={limit}."
            )
        (low, high), vocab = data.extremes, network.config.vocab_size
        if low < 0 or high >= vocab:
            raise ValueError(
                f"The data has token ids from {low} to {high}, and the model's vocabulary 0 to "
                f"{vocab - 1}: encode the data with the model's own tokenizer."
            )


def check_options(
    model: nn.Module, config: TrainConfig, groups: Groups | None
) -> tuple[dict[str, bool], list[dict[str, Any]]]:
    """How the GPT-2's blocks are run during a step, empty for another model; and the groups.

    Raises:
        ValueError: groups that do not fit; options that model, device or processes cannot follow.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    is_gpt2, compiled = isinstance(inner(model), GPT2), is_compiled(model)
    faults: list[str] = []
    if config.checkpointing and not is_gpt2:
        faults.append("checkpointing=True needs a GPT2; another model checkpoints itself")
    if config.compile and not (is_gpt2 or compiled):
        faults.append("compile=True needs a GPT2; give torch.compile(model) instead")
    device = next(iter(parameters.values())).device
    if config.cuda_graph and not devices.on_cuda(device):
        faults.append(f"cuda_graph=True needs a CUDA device, and the model is on {device}")
    faults += distributed.faults(model, config)
    if faults:
        raise ValueError(f"The model cannot be trained so: {'; '.join(faults)}.")
    compiling = config.compile and not compiled  # else torch.compile has the whole of it
    how = {"compile": compiling, "checkpointing": config.checkpointing}
    return how if is_gpt2 else {}, grouped(parameters, config, groups)


def require_count(name: str, value: object) -> None:
    """Raise a ValueError unless the value is an integer of at least 1."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")


def require_config(value: object) -> None:
    """Raise a ValueError unless the value is a TrainConfig."""
    if not isinstance(value, TrainConfig):
        raise ValueError(f"config must be a gpt2.TrainConfig, got {type(value).__name__}.")
