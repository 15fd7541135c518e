"""The sizes and dropouts of a GPT-2, as its `config.json` states them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gpt2.files import listed, outside, read_json


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """What is needed to build a GPT-2; the defaults are the 124M model's.

    Args:
        n_layer, n_head: numbers of blocks, and of attention heads a block, which divide `n_embd`.
        n_embd: width of the residual stream.
        block_size: longest context in tokens (`n_positions` in config.json).
        vocab_size: number of token ids.
        layer_norm_epsilon: added to the variance in every LayerNorm.
        embd_pdrop, attn_pdrop, resid_pdrop: dropout probabilities in [0, 1) on the embeddings,
            on the attention weights, and on what each half-block adds to the stream.

    Raises:
        ValueError: naming each field that is out of range.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
    """

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    vocab_size: int = 50257
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1

    def __post_init__(self) -> None:
        counts = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
        dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), "[0, 1)")
        faults = outside(self, dict.fromkeys(counts, 1), **dropouts, layer_norm_epsilon="(0, inf)")
        if not faults and self.n_embd % self.n_head:
            faults.append(f"n_head {self.n_head} must divide n_embd {self.n_embd}")
        if faults:
            raise ValueError(f"GPT2Config: {listed(faults)}.")


# The four published sizes by their names on the Hub.
SIZES: Mapping[str, GPT2Config] = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPT2Config(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPT2Config(n_layer=48, n_head=25, n_embd=1600),
}

# What else config.json may ask for: the supported values.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
_END_OF_TEXT = 50256  # the id that begins and ends a text


def read_config(file: Path) -> dict[str, Any]:
    """GPT2Config's fields in config.json; a ValueError lists what is not done here."""
    stated = read_json(file)
    width = stated.get("n_embd")
    accepted = {**_ACCEPTED, "n_inner": (None, 4 * width if type(width) is int else None)}
    if faults := [
        f"{key} {stated[key]!r} (supported: {' or '.join(map(repr, values))})"
        for key, values in accepted.items()
        if stated.get(key, values[0]) not in values
    ]:
        raise ValueError(f"{file} asks for what this GPT-2 does not do: {listed(faults)}.")

    stated["block_size"] = stated.get("n_positions", GPT2Config.block_size)
    return {field: stated[field] for field in asdict(GPT2Config()) if field in stated}


def dump_config(config: GPT2Config, dtype: torch.dtype) -> str:
    """config.json, byte for byte the same for the same model."""
    stated = asdict(config)
    stated["n_positions"] = stated["n_ctx"] = stated.pop("block_size")
    stated |= {key: values[0] for key, values in _ACCEPTED.items()}
    end = _END_OF_TEXT if config.vocab_size > _END_OF_TEXT else None
    stated |= {"bos_token_id": end, "eos_token_id": end, "architectures": ["GPT2LMHeadModel"]}
    stated["dtype"] = str(dtype).removeprefix("torch.")
    return json.dumps(stated, indent=2, sort_keys=True) + "\n"
