"""The training loop, which optimises whatever requires grad: one adapter or every weight.

A run is a pure function of model, data, config and seed, whatever its caller does between steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import nn

from gpt2.data.dataset import Dataset
from gpt2.training.checks import check_options, check_readable, require_config
from gpt2.training.config import TrainConfig
from gpt2.training.groups import Groups, listed
from gpt2.training.packing import settled
from gpt2.training.run import Run, StepRecord
from gpt2.training.wrapped import inner

__all__ = ["StepRecord", "Training", "train"]


class Training(Iterator[StepRecord]):
    """A run: each item takes a step, or a burst of `sync_every` steps, and tells of one.

    It says so if it was thrown away without a step, as Python does of a coroutine that nobody
    awaited.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._records, self._used = run.records(), False

    def __next__(self) -> StepRecord:
        """Take the next step."""
        self._used = True
        return next(self._records)

    def close(self) -> None:
        """End the run where it is."""
        self._used = True
        self._records.close()

    def __del__(self) -> None:
        if not getattr(self, "_used", True):  # a copy may have been refused halfway
            warnings.warn(
                "gpt2.train(...) was never iterated, so nothing was trained: "
                "write `for record in gpt2.train(...)`, or `list(gpt2.train(...))`.",
                RuntimeWarning,
                stacklevel=2,
                source=self,
            )


def train(
    model: nn.Module, data: Dataset, config: TrainConfig, *, groups: Groups | None = None
) -> Training:
    """Train whatever requires grad in the model, yielding a record after each optimiser step.

    Nothing happens until the result is iterated: `for record in gpt2.train(...)`. The model is in
    training mode within steps only: at each record, and however the run ends, every module is in
    its own mode. An interrupt leaves the weights of the last whole step; given several groups it
    may come between two of them.

    Args:
        model: a GPT-2, with adapters or without, or a wrapper around one, such as
            `torch.compile(model)` or `DistributedDataParallel(model)`; see
            `gpt2.training.wrapped.summed_loss` for others. Only what is given is called.
        data: the examples.
        config: how.
        groups: optimiser groups such as `lora.parameter_groups` gives: dicts of `params` and, where
            they differ from the config's, `lr`, `weight_decay`, `betas`, `eps`. The schedule scales
            each group's `lr`.

    Raises:
        ValueError: nothing requires grad; the data is no `Dataset`, empty, too long for the model
            or of another vocabulary; the config no `TrainConfig`; groups that do not hold each
            trained parameter once; options that the model cannot follow.
        RuntimeError: what requires grad has no part in the loss; the model was changed between two
            steps; a loss, a gradient or a trained weight is not finite.
    """
    check_readable(model, data)
    require_config(config)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("Nothing in the model requires grad: inject an adapter or unfreeze it.")
    config = settled(inner(model), config)
    groups = None if groups is None else listed(groups)
    check_options(model, config, groups)
    return Training(Run(model, data, config, groups))
