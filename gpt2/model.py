"""GPT-2, with the module names and tensor layouts of the published checkpoint.

Read from the bottom up for the whole (`GPT2`), from the top down for the parts. Nothing here knows
of LoRA: an adapter replaces a layer such as `transformer.h.0.attn.c_attn` from outside. What
comes from `gpt2.fast` computes what its name says (`attend`, `summed_loss`), only faster.

Shapes: B batch · T time · C n_embd · H heads · D head size · V vocab.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2 import pretrained
from gpt2.cache import KVCache, LayerCache, Place
from gpt2.config import GPT2Config
from gpt2.fast import head
from gpt2.fast.attention import Documents, Drops, attend
from gpt2.fast.compiling import through
from gpt2.layers import Conv1D, Dropout, LMHead


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which no position sees a later one."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.attn_pdrop = config.attn_pdrop
        self.drops: Drops | None = None  # as `Dropout.drops`
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_attn.slices = ("q", "k", "v")
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.resid_dropout = Dropout(config.resid_pdrop)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, place: Place | Documents | None = None
    ) -> Tensor:
        """Attend over `x` `(B, T, C)`, and over what the cache holds; a document over itself."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        visible = place if isinstance(place, Documents) else None
        if cache is not None and isinstance(place, Place):
            every_k, every_v = cache.write(qkv[:, :, 1:], place)
            if (visible := place.visible) is not None:
                k, v = every_k, every_v
        p = self.attn_pdrop if self.training else 0.0
        y = attend(q, k, v, visible, p, self.drops)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers around a tanh-approximated GELU, four times as wide in between."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, 4 * config.n_embd)
        self.c_proj = Conv1D(4 * config.n_embd, config.n_embd)
        self.dropout = Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, T, C)` to `(B, T, C)`."""
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """Attention, then the MLP, each reading a normalised copy of the stream and adding to it."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, place: Place | Documents | None = None
    ) -> Tensor:
        """Map the stream `(B, T, C)` to the stream `(B, T, C)`."""
        x = x + self.attn(self.ln_1(x), cache, place)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Everything but the head: token ids to hidden states."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.checkpointing = False  # keep only the blocks' inputs for backward, recompute the rest
        self.compiling = False  # run the blocks, unless there is a cache, through torch.compile
        self.longest: int | None = None  # tokens of a row's longest document, the context's if None
        self.smoothing = 0.0  # share of a target that the loss spreads over all tokens

    def forward(
        self, idx: Tensor, cache: KVCache | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """Hidden states `(B, T, C)` of the token ids `idx` `(B, T)`, after the last LayerNorm.

        With a cache, `idx` continues each row after the `cache.lengths` tokens that it holds.

        Raises:
            ValueError: `idx` is not a (B, T) tensor of integers, or does not fit the context.
        """
        apart = Documents.of(idx, documents, self.longest or self.config.block_size, cache)
        positions = self._positions(idx, cache) if apart is None else apart.positions()
        if cache is None:
            how = {"compiling": self.compiling, "checkpointing": self.checkpointing}
            x = through(_embed, self, idx, positions, compiling=self.compiling)
            for block in self.h:
                x = through(block, x, None, apart, **how)
        else:
            x, place = _embed(self, idx, positions), cache.advance(positions)
            for block, layer in zip(self.h, cache.layers, strict=True):
                x = block(x, layer, place)
        return self.ln_f(x)

    def _positions(self, idx: Tensor, cache: KVCache | None) -> Tensor:
        """The position of every token, `(1, T)` or with a cache `(B, T)`."""
        if idx.dim() != 2 or idx.dtype not in (torch.int32, torch.int64):
            found = f"{tuple(idx.shape)} {idx.dtype}"
            raise ValueError(f"idx must be (B, T) integers, got {found}: give int32 or int64.")
        T, limit = idx.shape[1], self.config.block_size if cache is None else cache.slots
        start = 0 if cache is None else cache.filled
        if not 1 <= T <= limit - start:
            raise ValueError(
                f"{start + T} tokens do not fit: this context takes 1 to {limit} tokens a row. "
                "Shorten the text or split it."
            )
        steps = torch.arange(T, device=idx.device)
        return steps[None] if cache is None else cache.lengths[:, None] + steps


def _embed(transformer: Transformer, idx: Tensor, positions: Tensor) -> Tensor:
    return transformer.drop(transformer.wte(idx) + transformer.wpe(positions))


class GPT2(nn.Module):
    """GPT-2 with its language-model head, whose weight is the token embedding's own.

    Args:
        config: sizes and dropouts. The weights are drawn as for pretraining (normal, 0.02; the
            layers that write to the stream narrower by √(2 n_layer)); `from_pretrained` loads them.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.name_or_path: str | None = None  # where the weights came from, as in transformers
        self.transformer = Transformer(config)
        self.lm_head = LMHead(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:
                narrower = (2 * config.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(p, std=0.02 * narrower)
            elif not name.endswith("weight"):  # LayerNorm weights are born as ones
                nn.init.zeros_(p)

    def forward(
        self,
        idx: Tensor,
        labels: Tensor | None = None,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Logits `(B, T, V)` of the next token after each of `idx` `(B, T)`; with labels the loss.

        Args:
            idx: token ids.
            labels: `(B, T)`, beside the ids: the token at that position, or `gpt2.IGNORE` where it
                is not to be learnt. The shift by one happens here.
            cache: what came before; see `Transformer.forward`.
            documents: `(S + 1,)`, where each text of a row of several begins, and the last ends.

        Returns:
            Logits; or, given labels, the cross-entropy summed over the supervised tokens, a scalar
            of float32 at least. A sum over parts of a batch is the batch's, a mean would not be.

        Raises:
            ValueError: as `Transformer.forward`; labels or documents that do not fit the ids.
        """
        if labels is not None and labels.shape != idx.shape:
            shapes = f"labels {tuple(labels.shape)} and token ids {tuple(idx.shape)}"
            raise ValueError(f"{shapes} differ: give each id its label, or gpt2.IGNORE.")
        x = self.transformer(idx, cache, documents)  # (B, T, C)
        if labels is None:
            return self.lm_head(x)
        compiling, smoothing = self.transformer.compiling, self.transformer.smoothing
        return head.summed_loss(self.lm_head, x, labels, compiling=compiling, smoothing=smoothing)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dropout: float | None = None,
        mmap: bool = True,
    ) -> Self:
        """Load published weights; see `gpt2.pretrained.load` for names, layouts and errors."""
        model = pretrained.load(cls, name, dtype=dtype, device=device, dropout=dropout, mmap=mmap)
        model.name_or_path = str(name)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`; see `gpt2.pretrained.save`."""
        pretrained.save(self, self.config, folder)
