"""From logits to the next token: pure functions, in transformers' order.

Shapes: B rows · V vocab.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2.files import listed, outside


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How to choose tokens and when to stop.

    Args:
        max_new_tokens: tokens per prompt at most.
        temperature: divides the logits; 0 is greedy, the most likely token each time.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the most likely tokens that together reach this probability.
        repetition_penalty: above 1 makes tokens that a row already holds less likely.
        seed: of the random numbers; row b of a batch draws as its prompt alone with seed + b.
        eos: the token id that ends a row, or several of them; None for no such id.
        num_beams: texts that are followed at once; the best is given. See `gpt2.beams`.
        length_penalty: a beam's score is its log-probability over its length to this power.
        no_repeat_ngram: of beams, the length of runs of tokens that may not come twice.
        no_repeat_prompt: runs of the prompt may not come again either, as in transformers.

    Raises:
        ValueError: naming each field that is out of range.
    """

    max_new_tokens: int = 40
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    eos: int | tuple[int, ...] | None = 50256
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram: int | None = None
    no_repeat_prompt: bool = False

    def __post_init__(self) -> None:
        counts = ("max_new_tokens", "top_k", "num_beams", "no_repeat_ngram")
        least = dict.fromkeys(counts, 1) | {"seed": 0}
        intervals = {"temperature": "[0, inf)", "top_p": "(0, 1]", "repetition_penalty": "(0, inf)"}
        faults = outside(self, least, **intervals, length_penalty="(-inf, inf)")
        if not all(type(end) is int and end >= 0 for end in self.ends):
            faults.append(f"eos must be ids of at least 0, or None, got {self.eos!r}")
        if self.no_repeat_prompt and self.no_repeat_ngram is None:
            faults.append("no_repeat_prompt takes a no_repeat_ngram")
        beams = ("length_penalty", "no_repeat_ngram", "no_repeat_prompt")
        draws = ("temperature", "top_k", "top_p", "repetition_penalty")
        for name in beams if self.num_beams == 1 else draws:
            if getattr(self, name) != getattr(GenerateConfig, name):
                faults.append(f"{name} does not go with num_beams {self.num_beams!r}")
        if faults:
            raise ValueError(f"GenerateConfig: {listed(faults)}.")

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end a row."""
        if self.eos is None:
            return ()
        return self.eos if isinstance(self.eos, tuple) else (self.eos,)


def uniform_numbers(rows: int, config: GenerateConfig) -> Tensor:
    """Random numbers `(max_new_tokens, rows, 2)` in [0, 1), float64 on the CPU.

    Each row has a generator, so that it draws as alone, on any device.
    """
    generators = [torch.Generator("cpu").manual_seed(config.seed + row) for row in range(rows)]
    size = (config.max_new_tokens, 2)
    draws = [torch.rand(size, dtype=torch.double, device="cpu", generator=g) for g in generators]
    return torch.stack(draws, 1)


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide the positive logits of `seen` tokens by `penalty`, and multiply the negative ones.

    Source: Keskar et al. 2019, "CTRL", section 4.1, as transformers applies it.
    """
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalised, logits)


def apply_top_k(logits: Tensor, k: int) -> Tensor:
    """Rule out all but the `k` greatest of `logits` `(B, V)`, and those that tie with the last."""
    kth = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def apply_top_p(logits: Tensor, p: float) -> Tensor:
    """Rule out the least likely tokens that together have no more than 1 - `p`; keep one at least.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.
    """
    ascending, order = logits.sort()
    ruled_out = ascending.softmax(-1).cumsum(-1) <= 1 - p  # (B, V)
    ruled_out[:, -1] = False
    return logits.masked_fill(ruled_out.scatter(-1, order, ruled_out), -math.inf)


def greedy(logits: Tensor) -> Tensor:
    """The most likely token `(B,)` of each row; -1 where `sample` gives -1."""
    return _or_none(*logits.max(-1))


def sample(logits: Tensor, config: GenerateConfig, uniform: Tensor) -> Tensor:
    """The next token `(B,)` of each row; -1 where its logits hold NaN or +inf, or are all -inf.

    Temperature, top-k and top-p are applied in this order, as in transformers. The token is drawn
    where the random numbers `uniform` `(B, 2)` lie, float64 in [0, 1).
    """
    device = logits.device
    # A device without float64 has its tokens drawn on the CPU.
    logits = logits.to(uniform.device).float() / config.temperature
    whole = logits
    if config.top_k is not None:
        logits = apply_top_k(logits, config.top_k)
    if config.top_p is not None:
        logits = apply_top_p(logits, config.top_p)
    tokens = _drawn(logits.double().softmax(-1), uniform)
    return _or_none(whole.amax(-1), tokens).to(device)


def _drawn(p: Tensor, uniform: Tensor) -> Tensor:
    """A token `(B,)` for each row of probabilities `(B, V)`: first a block of √V, then one of it.

    Rounding moves each bound a little: a draw seldom lies beside one of 2√V bounds, not V.
    """
    side = math.isqrt(p.shape[-1] - 1) + 1
    blocks = F.pad(p, (0, side * side - p.shape[-1])).reshape(-1, side, side)
    block = _inverted(blocks.sum(-1), uniform[:, 0]).clamp(max=side - 1)  # past it if p is NaN
    of_block = blocks.gather(1, block[:, None, None].expand(-1, -1, side))[:, 0]
    return block * side + _inverted(of_block, uniform[:, 1])


def _inverted(p: Tensor, uniform: Tensor) -> Tensor:
    """Where the cumulative sums of `p` `(B, N)` pass the share `uniform` `(B,)` of their total.

    In float64 no token is too unlikely to be drawn, and since uniform is at most 1 - 2**-53, the
    product stays below the total.
    """
    cumulative = p.cumsum(-1)
    drawn = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, drawn, right=True)[:, 0]


def _or_none(greatest: Tensor, tokens: Tensor) -> Tensor:
    """The tokens `(B,)`, or -1 in rows whose greatest logit is not finite; NaN is greatest."""
    return torch.where(greatest.abs() < math.inf, tokens, -1)  # three kernels; isfinite takes four
