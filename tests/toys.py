"""Small models and helpers that the tests of `lora` share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gpt2
import lora
from gpt2.data.examples import within

TINY = gpt2.GPT2Config(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=61)
IDX = torch.randint(0, TINY.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))


def tiny_gpt2(
    seed: int = 0, dtype: torch.dtype = torch.float32, dropout: float = 0.1, device: str = "cpu"
) -> gpt2.GPT2:
    """A GPT-2 of two blocks with weights large enough to matter, in eval mode."""
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = gpt2.GPT2(replace(TINY, **rates)).to(dtype)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape) * 0.3)
    return model.eval().to(device)


def tiny_data(n: int = 7, long: tuple[int, ...] = ()) -> gpt2.Dataset:
    """Examples of 4 to 12 tokens, but for the long ones, which have 30."""
    random = np.random.default_rng(1)
    lengths = random.integers(4, 13, n)
    lengths[[*long]] = 30
    ids = random.integers(0, TINY.vocab_size, int(lengths.sum()), np.int32)
    return gpt2.Dataset(ids, np.cumsum(lengths), random.integers(0, 3, n).astype(np.int32))


def twin(model: gpt2.GPT2) -> nn.Module:
    """transformers' model with the same weights; the state dict must fit without renaming."""
    transformers = pytest.importorskip("transformers", reason="compares with it (extra: peers)")
    c = model.config
    same = {k: v for k, v in vars(c).items() if k != "block_size"}
    none = dict.fromkeys(("bos_token_id", "eos_token_id"))
    config = transformers.GPT2Config(**same, **none, n_positions=c.block_size, pad_token_id=0)
    theirs = transformers.GPT2LMHeadModel(config)
    theirs.load_state_dict(model.state_dict())
    return theirs.to(model.lm_head.weight.dtype).eval()


TEXTS = [
    "Q: How do transformers work?\nA: Transformers process sequences using self-attention.",
    "Q: What does physics explain?\nA: Physics explains natural phenomena using mathematical "
    "models.",
    "Q: What do machine learning models do?\nA: Machine learning models learn patterns from data.",
    "Q: How do transformers work?\nA: Transformers process sequences using self-attention "
    "mechanisms.",
    "Q: What is self-attention?\nA: Self-attention allows tokens in a sequence to attend to each "
    "other.",
]


class Letters:
    """A tokenizer of one id a letter, its code; 0 ends a text."""

    eos, fingerprint = 0, "letters"

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


class MLP(nn.Module):
    """Two plain linear layers; `square` keeps every weight's shape its own transpose's."""

    def __init__(self, width: int = 6, hidden: int = 6) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def layer(kind: str, n_in: int, n_out: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A base layer of either orientation with random weights."""
    base = nn.Linear(n_in, n_out) if kind == "linear" else gpt2.Conv1D(n_in, n_out)
    nn.init.normal_(base.weight)
    nn.init.normal_(base.bias)
    return base.to(dtype)


def deltas(value: dict[str, lora.algebra.Factors]) -> dict[str, Tensor]:
    """The dense weight changes of an adapter's value, `(out, in)` by path."""
    return {path: pair.delta() for path, pair in value.items()}


def untie(layer: nn.Module) -> None:
    """Give a layer whose weight is shared, such as a tied head, one of its own."""
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def dense(base: nn.Module) -> Tensor:
    """The weight as (out, in), told by the class here too, but written out anew."""
    return base.weight.detach().t() if isinstance(base, gpt2.Conv1D) else base.weight.detach()


def randomize(model: nn.Module, adapter: str = "default", seed: int = 1, std: float = 0.3) -> None:
    """Give an adapter factors as training might: no zeros, A and B alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, lora.LoRALinear) and adapter in module.updates:
                for p in module.updates[adapter].parameters():
                    p.copy_(torch.randn(p.shape, generator=generator) * std)


def adapted(
    model: nn.Module | None = None, *, adapter: str = "default", values: int = 1, **settings
) -> nn.Module:
    """A model, by default `tiny_gpt2()`, with one more adapter as training might leave it."""
    model = tiny_gpt2() if model is None else model
    lora.inject(model, adapter=adapter, **{"r": 2, "seed": 0} | settings)
    randomize(model, adapter, values)
    return model


@contextmanager
def refused(model: nn.Module, words: str, error: type[Exception] = ValueError) -> Iterator[None]:
    """The body raises this error and leaves the model as it was."""
    before = snapshot(model)
    with pytest.raises(error, match=words):
        yield
    assert snapshot(model) == before


def snapshot(model: nn.Module) -> dict[str, object]:
    """All that a failing call must leave as it was: modules, bytes, flags."""
    state: dict[str, object] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        state[f"{name}()"] = (id(module), module.training)
        if isinstance(module, lora.LoRALinear):
            state[f"{name} lora"] = (
                tuple(module.active.items()),
                dict(module.resting),
                module.enabled,
                module.routing is None,
                module.merged is None,
            )
    for name, p in model.named_parameters(remove_duplicate=False):
        state[name] = (id(p), p.requires_grad, p.dtype, raw(p))
    for name, b in model.named_buffers(remove_duplicate=False):
        state[name] = raw(b)
    return state


def raw(tensor: Tensor) -> bytes:
    """A tensor's bytes; on the meta device it has none."""
    if tensor.is_meta:
        return str(tensor.shape).encode()
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def split(examples, share: float) -> tuple[list[gpt2.Example], list[gpt2.Example]]:
    """Examples to learn and examples that are held out, in their order."""
    learnt, held_out = ((share, 1.0), (0.0, share))
    return list(within(examples, learnt)), list(within(examples, held_out))
