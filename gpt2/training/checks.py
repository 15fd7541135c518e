"""Whether this model can read this data: said before anything is done."""

from __future__ import annotations

from torch import nn

from gpt2.data.tokens import Dataset
from gpt2.model import GPT2
from gpt2.training.wrapped import inner


def check_readable(model: nn.Module, data: Dataset) -> None:
    """Find out whether the model can be called on the data.

    Raises:
        ValueError: it is no module, the data no `Dataset`, empty, or too long for the model.
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
    network = inner(model)
    if isinstance(network, GPT2):
        longest, limit = data.longest, network.config.block_size
        if longest > limit:
            raise ValueError(
                f"An example has {longest} tokens and the model's context takes {limit}: "
                f"encode the data with max_length={limit}."
            )
