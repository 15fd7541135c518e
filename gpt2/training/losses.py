"""What is trained and evaluated: any model that reads the data, and its loss."""

from typing import Any

from torch import Tensor, nn

from gpt2.data.dataset import Dataset
from gpt2.loss import summed
from gpt2.model import GPT2


def inner(model: nn.Module) -> nn.Module:
    """What torch.compile was given; the model itself if it is not compiled."""
    return getattr(model, "_orig_mod", model)


def summed_loss(
    model: nn.Module,
    idx: Tensor,
    labels: Tensor,
    documents: Tensor | None = None,
    *,
    longest: int | None = None,
    smoothing: float = 0.0,
    compile: bool = False,
) -> Tensor:
    """The cross-entropy summed over the supervised tokens, a scalar of float32 at least.

    Args:
        model: a GPT-2, with adapters or without; or a module from `(B, T)` ids to logits
            `(B, T, V)`, or to an object with `logits`, as transformers' models give it.
        idx, labels: `(B, T)`; a label is `IGNORE` where nothing is learnt.
        documents, longest, smoothing, compile: as for `GPT2.forward`.

    Raises:
        ValueError: the model gives no logits.
    """
    if isinstance(inner(model), GPT2):
        how: Any = {"longest": longest, "smoothing": smoothing, "compile": compile}
        return model(idx, labels, documents=documents, **how)
    if documents is not None:
        raise ValueError(f"Packing takes a GPT-2, not {type(model).__name__}.")
    return summed(logits_of(model, idx), labels, smoothing)


def logits_of(model: nn.Module, idx: Tensor) -> Tensor:
    """The logits `(B, T, V)` of any model; a ValueError where it gives none."""
    out: Any = model(idx)
    logits = getattr(out, "logits", out)
    if not (isinstance(logits, Tensor) and logits.dim() == 3):
        raise ValueError(
            f"{type(model).__name__} gives {type(out).__name__}: it must map ids to logits "
            "(B, T, V), or to an object with .logits."
        )
    return logits


def check_readable(model: nn.Module, data: Dataset) -> None:
    """Raise a ValueError unless the model can be called on the data."""
    if not isinstance(data, Dataset):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            f"data must be a gpt2.Dataset, got {type(data).__name__}: make one with "
            "gpt2.encode(texts, tokenizer)."
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
                f"The data has token ids from {low} to {high}, the model 0 to {vocab - 1}: "
                "encode it with the model's tokenizer."
            )
