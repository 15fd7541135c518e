"""The loss on examples that are only read."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpt2.data.batches import Batch, collate
from gpt2.data.dataset import Array, Dataset
from gpt2.fast import devices
from gpt2.loss import IGNORE
from gpt2.model import GPT2, in_mode
from gpt2.training import distributed
from gpt2.training.losses import check_readable, logits_of, summed_loss
from gpt2.training.scores import Score, Scorer, interval


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well a model predicts examples."""

    loss: float  # mean over the supervised tokens, nats
    tokens: int  # supervised
    examples: int
    exact_match: float | None = None  # share of the prompts that are answered as a reference
    score: float | None = None  # of generated texts
    interval: tuple[float, float] | None = None  # the score's, 95 %, over other prompts

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite past a float."""
        return math.exp(self.loss) if not self.loss > 709 else math.inf


def evaluate(
    model: nn.Module,
    data: Dataset,
    *,
    batch_size: int = 8,
    autocast: bool = False,
    references: bool = False,
    score: Score | None = None,
    prompts: int | None = None,
) -> Evaluation:
    """The mean loss over all supervised tokens of the data, without dropout.

    Modes, gradients and random states are afterwards as before.

    Args:
        model: as for `gpt2.train`.
        data: the examples.
        batch_size: examples a forward pass; another one changes the loss by rounding only.
        autocast: compute in bfloat16 beside float32 weights.
        references: also give the share of prompts that the model continues greedily with one of
            their completions and its end.
        score: from greedy texts and each one's references (its prompt's completions) to a number,
            the higher the better, such as `gpt2.exact_match`. It is called 1,001 times, unless it
            has a method `interval`.
        prompts: how many are scored; None for all.

    Raises:
        ValueError: the data does not fit the model; references or a score of data without prompts.
    """
    check_readable(model, data)
    device = next(iter(model.parameters())).device
    order = data.by_length[::-1]  # little padding; the largest batch first

    starts = range(0, len(data), batch_size)
    exact = np.zeros(len(data), bool)
    asked = np.asarray(data.prompts)
    if references and not asked.any():
        raise ValueError("references=True takes examples with a prompt, and no example has one.")

    rank = distributed.rank()
    size = distributed.size()
    mine: list[tuple[float, int, Array]] = []
    with devices.own_generators(device), in_mode(model, training=False), torch.no_grad():
        # A sharded model runs in all processes at once.
        for number in range(rank, math.ceil(len(starts) / size) * size, size):
            start = starts[min(number, len(starts) - 1)]
            chosen = order[start : start + batch_size]
            batch = collate(data, chosen)
            moved, right = batch.to(device), np.zeros(len(chosen), bool)
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = summed_loss(model, moved.idx, moved.labels)
                if references:
                    right = _are_greedy(model, moved, torch.from_numpy(asked[chosen]))
            mine.append((float(loss), batch.n_tokens, right))
    every = distributed.gathered(mine)

    total = 0.0
    tokens = 0
    for number, start in enumerate(starts):
        loss, count, right = every[number % size][number // size]
        total += loss
        tokens += count
        exact[order[start : start + batch_size]] = right

    scored: dict[str, Any] = {}
    if score is not None:
        scorer = Scorer(data, score, prompts)
        texts = scorer.texts(model), scorer.references
        scored = {"score": float(score(*texts)), "interval": interval(score, *texts)}

    share = None
    if references:  # of the different prompts, those that have an exact example
        keys = np.concatenate([*data.prompt_keys()])
        share = len(np.unique(keys[(asked > 0) & exact])) / len(np.unique(keys[asked > 0]))
    return Evaluation(
        loss=total / tokens,
        tokens=tokens,
        examples=len(data),
        exact_match=share,
        **scored,
    )


def _are_greedy(model: nn.Module, batch: Batch, prompts: Tensor) -> Array:
    """Whether each token of a row's completion is the most likely."""
    idx = batch.idx
    targets = batch.labels[:, 1:]
    at = torch.arange(1, idx.shape[1], device=idx.device)
    wanted = (targets != IGNORE) & (at >= prompts.to(idx.device)[:, None])
    right = ~wanted
    if isinstance(model, GPT2):
        hidden = model.transformer(idx)[:, :-1][wanted]
        ids = targets[wanted]
        size = devices.positions_at_a_time(idx.device)
        parts = [slice(start, start + size) for start in range(0, max(1, len(ids)), size)]
        right[wanted] = torch.cat([model.lm_head(hidden[p]).argmax(-1) == ids[p] for p in parts])
    else:
        for row in range(len(idx)):  # its logits are all that is held
            most_likely = logits_of(model, idx[row : row + 1])[0, :-1].argmax(-1)
            right[row] |= most_likely == targets[row]
    return (right.all(1) & wanted.any(1)).cpu().numpy()
