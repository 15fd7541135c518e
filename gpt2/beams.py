"""Beam search: follow the likeliest texts at once, and give the best that has ended.

Scores and the end are those of transformers' `early_stopping=False`: a text's score is its
log-probability over its length to the power of `length_penalty`; a prompt is done once no
running text, had it ended now, would beat the worst of the `num_beams` best that ended.

Shapes: B prompts · K beams · C candidates · N new tokens · P slots before them · V vocab.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpt2.fast.decoding import Steps
from gpt2.sampling import GenerateConfig

NOTHING = -1  # in a history, where there is no token


class Beams(Steps):
    """The beams of each prompt; what is done stays, however many steps follow."""

    def _begin(self, rows: Sequence[Sequence[int]], logits: Tensor) -> None:
        config, device = self.config, self.device
        how = self.integers
        B, K, N = len(rows), config.num_beams, config.max_new_tokens
        self.cache.repeat(K)
        self._shared = min(map(len, rows))  # slots alike in all beams of a prompt
        before = torch.tensor(_before(rows, config), **how)  # (B, P)
        self._before = before.shape[1]
        self.history = torch.full((B, K, self._before + N), NOTHING, device=device)
        self.history[..., : self._before] = before[:, None]

        floats: Any = {"dtype": torch.float32, "device": device}
        # Running texts' log-probabilities, best first; -inf for no beam.
        self.scores = torch.full((B, K), -torch.inf, **floats)
        self.scores[:, 0] = 0  # beams are alike: one chooses the first tokens
        # The best scores of ended texts, and the best text with its length.
        self.ended = torch.full((B, K), -torch.inf, **floats)
        self.text = torch.zeros(B, N, **how)
        self.length = torch.zeros(B, **how)
        # Whether a running text may still join them; when logits were not finite.
        self.open = torch.ones(B, dtype=torch.bool, device=device)
        self.failed = torch.full((B,), -1, device=device)
        self.n = torch.zeros(1, **how)
        self.tokens = torch.zeros(B * K, **how)
        self._ends = torch.tensor(config.ends, **how)

        # So many candidates cannot all have ended: K are left to go on with.
        self._candidates = K * max(2, 1 + len(config.ends))
        powers = [length**config.length_penalty for length in range(1, N + 1)]
        self._powers = torch.tensor(powers, **floats)  # (N,)
        self._extend(logits.repeat_interleave(K, 0))

    def are_open(self) -> bool:
        """Whether a prompt is open and none has failed; the host waits for the device."""
        return bool(self.open.any() & (self.failed < 0).all())

    def best(self) -> list[list[int]]:
        """The best text of each prompt, without the token that ended it."""
        lengths = self.length.tolist()
        texts = [row[:n] for row, n in zip(self.text.tolist(), lengths, strict=True)]
        return [row[:-1] if row and row[-1] in self.config.ends else row for row in texts]

    def _extend(self, logits: Tensor) -> Tensor:
        """Take the beams one token further, given logits `(B·K, V)`."""
        B, K, _ = self.history.shape
        log_probs = logits.float().log_softmax(-1)
        bad = log_probs[:, 0].view(B, K).isnan().any(-1)  # then all of a row's are
        self.failed.copy_(torch.where(bad & self.open & (self.failed < 0), self.n, self.failed))
        if self.config.no_repeat_ngram is not None:
            end = self.n + self._before
            forbid_repeats(log_probs, self.history.flatten(0, 1), end, self.config.no_repeat_ngram)

        V = log_probs.shape[-1]
        total = (log_probs.view(B, K, V) + self.scores[..., None]).flatten(1)  # (B, K·V)
        scores, which = total.topk(min(self._candidates, K * V))  # (B, C), best first
        beams, tokens = which // V, which % V
        last = self.n == len(self._powers) - 1
        ends = (tokens[..., None] == self._ends).any(-1) | last  # (B, C)
        power = self._powers[self.n]
        self._end(torch.where(ends, scores / power, -torch.inf)[:, :K], beams, tokens)
        self._go_on(scores.masked_fill(ends, -torch.inf), beams, tokens)
        self.n += 1
        self.open &= self.scores[:, 0] / power > self.ended[:, -1]
        return self.tokens

    def _end(self, scores: Tensor, beams: Tensor, tokens: Tensor) -> None:
        """Keep the best of the ending candidates, of the first K only, with scores `(B, K)`."""
        scores = scores.masked_fill(~self.open[:, None], -torch.inf)
        score, which = scores.max(-1, keepdim=True)  # (B, 1)
        better = score > self.ended[:, :1]
        text = _followed(self.history, beams.gather(1, which))[:, 0, self._before :]  # (B, N)
        text = text.index_copy(1, self.n, tokens.gather(1, which))
        self.text.copy_(torch.where(better, text, self.text))
        self.length.copy_(torch.where(better[:, 0], self.n + 1, self.length))
        self.ended.copy_(torch.cat([self.ended, scores], 1).topk(self.ended.shape[1]).values)

    def _go_on(self, scores: Tensor, beams: Tensor, tokens: Tensor) -> None:
        """The best K candidates, `(B, C)` each, are the beams from now on."""
        B, K, _ = self.history.shape
        scores, which = scores.topk(K)  # (B, K)
        beams = beams.gather(1, which)
        tokens = tokens.gather(1, which)
        history = _followed(self.history, beams)
        self.history.copy_(history.index_copy(2, self.n + self._before, tokens[..., None]))
        self.scores.copy_(scores)
        self.tokens.copy_(tokens.flatten())
        rows = beams + K * torch.arange(B, device=beams.device)[:, None]
        self.cache.reorder(rows.flatten(), self._shared)


def forbid_repeats(log_probs: Tensor, history: Tensor, end: Tensor, size: int) -> None:
    """Set to -inf what would make a run of `size` tokens that `history` `(R, L)` holds already.

    `log_probs` `(R, V)` is changed in place; `end` `(1,)` is where the next token goes.
    """
    runs = history.unfold(1, size, 1)  # (R, L - size + 1, size)
    at = torch.arange(1 - size, 0, device=end.device) + end
    tail = history.index_select(1, at)  # (R, size - 1)
    same = (runs[..., :-1] == tail[:, None]).all(-1) & (runs[..., -1] != NOTHING)
    ceiling = torch.where(same, -torch.inf, torch.inf).to(log_probs.dtype)
    log_probs.scatter_reduce_(1, runs[..., -1].clamp(min=0), ceiling, "amin")


def _before(rows: Sequence[Sequence[int]], config: GenerateConfig) -> list[list[int]]:
    """The P slots before a row's new tokens: its prompt if that counts, or nothing."""
    counted = rows if config.no_repeat_prompt else [()] * len(rows)
    P = max((config.no_repeat_ngram or 1) - 1, *map(len, counted))
    return [[*[NOTHING] * (P - len(row)), *row] for row in counted]


def _followed(history: Tensor, beams: Tensor) -> Tensor:
    """The histories `(B, J, L)` of these beams `(B, J)`."""
    return history.gather(1, beams[..., None].expand(-1, -1, history.shape[-1]))
