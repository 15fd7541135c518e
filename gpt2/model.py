"""GPT-2, with the module names and tensor layouts of the published checkpoint.

Read `GPT2`, at the end, for the whole, and from the top for the parts. Nothing here knows of LoRA:
an adapter replaces a layer such as `transformer.h.0.attn.c_attn` from outside. What comes from
`gpt2.fast` computes what its name says, only faster.

Shapes: B batch · T time · C n_embd · H heads · D head size · V vocab.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2 import pretrained
from gpt2.cache import Documents, KVCache, LayerCache, Mask
from gpt2.config import GPT2Config
from gpt2.fast.attention import attend
from gpt2.fast.dropout import drop
from gpt2.fast.head import summed_loss
from gpt2.fast.products import linear


class Conv1D(nn.Module):
    """A linear layer whose weight is `(in, out)`, as in the published GPT-2."""

    slices: tuple[str, ...] = ()  # names of equal parts of the output: q, k, v

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(…, in)` to `(…, out)`: `x W + b`."""
        return linear(x, self.weight.t(), self.bias)


class LMHead(nn.Linear):
    """The map from hidden states to logits: `x Wᵀ`."""

    computes_linear = True  # so that it is taken for an nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """Map `(…, C)` to `(…, V)`."""
        return linear(input, self.weight)


class Dropout(nn.Dropout):
    """Zeros at random in training mode, and the rest scaled up so that the mean stays.

    A population sets `drops`, which then drops instead.
    """

    drops: Callable[[Tensor, float], Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and self.p):
            return input
        return drop(input, self.p)[0] if self.drops is None else self.drops(input, self.p)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which no position sees a later one."""

    drops: Callable[[Tensor, float], Tensor] | None = None  # as `Dropout.drops`

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.attn_pdrop = config.attn_pdrop
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_attn.slices = ("q", "k", "v")
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.resid_dropout = Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, mask: Mask = None, cache: LayerCache | None = None) -> Tensor:
        """Attend over `x` `(B, T, C)` and the cache, as far as the mask allows."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # (B, H, T, D) each
        if cache is not None:
            k, v = cache.extend(kv=qkv[:, :, 1:])
        p = self.attn_pdrop if self.training else 0.0
        y = attend(q, k, v, mask, p, self.drops)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers around a tanh-approximated GELU, of width 4 C."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, 4 * config.n_embd)
        self.c_proj = Conv1D(4 * config.n_embd, config.n_embd)
        self.dropout = Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, T, C)` to `(B, T, C)`."""
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """Attention, then the MLP; each reads the normalised stream and adds to it."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Mask = None, cache: LayerCache | None = None) -> Tensor:
        """Map the stream `(B, T, C)` to the stream `(B, T, C)`."""
        x = x + self.attn(self.ln_1(x), mask, cache)
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

    def forward(
        self,
        idx: Tensor,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        longest: int | None = None,
    ) -> Tensor:
        """Hidden states `(B, T, C)` after the LayerNorm."""
        mask: Mask = None
        layers: Sequence[LayerCache | None] = [None] * len(self.h)
        if documents is not None:
            mask = Documents.of(idx, documents, longest or self.config.block_size, cache)
            positions = mask.positions()
        else:
            positions = self._positions(idx, cache)
            if cache is not None:
                mask, layers = cache.advance(positions)
        x = self.embed(idx, positions)
        for block, layer in zip(self.h, layers, strict=True):
            x = block(x, mask, layer)
        return self.ln_f(x)

    def embed(self, idx: Tensor, positions: Tensor) -> Tensor:
        """The stream that the first block reads."""
        return self.drop(self.wte(idx) + self.wpe(positions))

    def _positions(self, idx: Tensor, cache: KVCache | None) -> Tensor:
        """The position of every token, `(1, T)` or with a cache `(B, T)`."""
        _, T = idx.shape
        start, limit = 0, self.config.block_size
        if cache is not None:
            start, limit = cache.filled, cache.slots
        if not 1 <= T <= limit - start:
            raise ValueError(f"{start + T} tokens do not fit into a row of 1 to {limit}.")
        steps = torch.arange(T, device=idx.device)
        return steps[None] if cache is None else cache.lengths[:, None] + steps


class GPT2(nn.Module):
    """GPT-2 with its language-model head, whose weight is the token embedding's.

    Args:
        config: sizes and dropouts. The weights are drawn as for pretraining (normal, 0.02; the
            layers that write to the stream narrower by √(2 n_layer)); `from_pretrained` loads them.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.name_or_path: str | None = None  # of the weights, as in transformers
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
        *,
        longest: int | None = None,
        smoothing: float = 0.0,
        compile: bool = False,
    ) -> Tensor:
        """Logits `(B, T, V)` of the next token after each of `idx` `(B, T)`; with labels the loss.

        Args:
            idx: token ids.
            labels: `(B, T)`, the id at each position, or `gpt2.IGNORE` where it is not learnt. The
                shift by one happens here.
            cache: `idx` continues each row after the `cache.lengths` tokens that it holds.
            documents: `(S + 1,)`, where each text of the one row begins, and the last ends.
            longest: tokens of the longest of them; the context's length if None.
            smoothing: share of each target that the loss spreads evenly over all tokens.
            compile: run the loss through torch.compile where that is faster.

        Returns:
            Logits; or, given labels, the cross-entropy summed over the supervised tokens, a scalar
            of float32 at least.

        Raises:
            ValueError: ids that pass the context; labels or documents that do not fit the ids.
        """
        if labels is not None and labels.shape != idx.shape:
            shapes = f"labels {tuple(labels.shape)} and token ids {tuple(idx.shape)}"
            raise ValueError(f"{shapes} differ: give each id its label, or gpt2.IGNORE.")
        x = self.transformer(idx, cache, documents, longest)  # (B, T, C)
        if labels is None:
            return self.lm_head(x)
        return summed_loss(self.lm_head, x, labels, compiling=compile, smoothing=smoothing)

    def prefill(self, rows: Sequence[Sequence[int]], slots: int) -> tuple[Tensor, KVCache]:
        """Read prompts of any lengths: logits `(B, V)` after their last tokens, and a cache."""
        weight = self.lm_head.weight
        lengths = [len(row) for row in rows]
        device = weight.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        cache = KVCache(self.config, len(rows), slots, dtype, device)
        padded = [[*row, *[0] * (max(lengths) - len(row))] for row in rows]
        hidden = self.transformer(torch.tensor(padded, device=device), cache)  # (B, T, C)

        # The padding's slots are overwritten before they are seen.
        cache.lengths = torch.tensor(lengths, device=device)
        last = hidden[torch.arange(len(rows), device=device), cache.lengths - 1]
        return self.lm_head(last), cache

    from_pretrained = classmethod(pretrained.load)
    save_pretrained = pretrained.save


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Generator[None]:
    """The whole model in one mode within, each module in its former mode after."""
    changed = [module for module in model.modules() if module.training is not training]
    try:
        for module in changed:
            module.training = training
        yield
    finally:
        for module in changed:
            module.training = not training
