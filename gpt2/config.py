"""The sizes and dropouts of a GPT-2, as its `config.json` states them."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """What is needed to build a GPT-2; the defaults are the 124M model's.

    Args:
        n_layer: number of blocks.
        n_head: attention heads a block; must divide `n_embd`.
        n_embd: width of the residual stream.
        block_size: longest context in tokens (`n_positions` in config.json).
        vocab_size: number of token ids.
        layer_norm_epsilon: added to the variance in every LayerNorm.
        embd_pdrop, attn_pdrop, resid_pdrop: dropout probabilities in [0, 1) on the embeddings,
            on the attention weights, and on what each half-block adds to the stream.

    Raises:
        ValueError: naming each field that is out of range.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2.
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
        faults = [
            f"{name} must be a positive integer, got {value!r}"
            for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
            if type(value := getattr(self, name)) is not int or value < 1
        ]
        faults += [
            f"{name} must be in [0, 1), got {value!r}"
            for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")
            if not 0 <= (value := getattr(self, name)) < 1
        ]
        if not self.layer_norm_epsilon > 0:
            faults.append(f"layer_norm_epsilon must be above 0, got {self.layer_norm_epsilon!r}")
        if not faults and self.n_embd % self.n_head:
            faults.append(f"n_head {self.n_head} must divide n_embd {self.n_embd}")
        if faults:
            raise ValueError("GPT2Config: " + "; ".join(faults) + ".")


SIZES = MappingProxyType(
    {
        "gpt2": GPT2Config(),
        "gpt2-medium": GPT2Config(n_layer=24, n_head=16, n_embd=1024),
        "gpt2-large": GPT2Config(n_layer=36, n_head=20, n_embd=1280),
        "gpt2-xl": GPT2Config(n_layer=48, n_head=25, n_embd=1600),
    }
)
"""The four published sizes by their names on the Hub."""
