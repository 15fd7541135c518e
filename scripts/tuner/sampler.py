"""What Optuna is used for: it proposes trials, and keeps a study that optuna-dashboard opens.

Optuna stores no sampler's state. So each wave has a study of its own in memory, made anew of what
is known, and a sampler whose seed is the search's and the wave's: proposals are a function of them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .space import INTEGERS, Range, Space
from .trials import Values

TRIES = 100  # proposals for a trial that stands in no earlier one


class Known(NamedTuple):
    """A trial with its losses by rung, from 1; none of one that ended, which is the worst."""

    values: Values
    losses: Mapping[int, float]
    complete: bool


def optuna() -> Any:
    """Optuna, which only a search needs; a ValueError where it is missing."""
    try:
        import optuna  # slow to import
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise ValueError("optuna is missing: pip install 'lora-gpt2[search]'.") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def propose(
    space: Space, n: int, known: Sequence[Known], *, sampler: str, seed: int
) -> list[Values]:
    """Values of n trials that are not known; a function of the arguments. TPE learns from `known`.

    The space has to have as many.
    """
    kinds = optuna().samplers
    kind = kinds.RandomSampler if sampler == "random" else kinds.TPESampler
    study = optuna().create_study(sampler=kind(seed=seed % 2**32))
    axes = _add(study, space, known)
    seen, proposed, tries = {_key(trial.values) for trial in known}, list[Values](), 0
    while len(proposed) < n:
        asked, tries = study.ask(axes).params, tries + 1
        values: Values = {name: asked[name] for name in space.axes}
        if _key(values) in seen and tries > TRIES * n:  # few are left: take the first
            values = next(v for v in space.all() if _key(v) not in seen)
        if _key(values) not in seen:
            seen.add(_key(values))
            proposed.append(values)
    return proposed


def write_study(file: Path, space: Space, known: Sequence[Known]) -> None:
    """Write the study anew, in the file that optuna-dashboard opens; whole or not at all."""
    part = file.with_name(f".{file.name}.part")
    part.unlink(missing_ok=True)
    storage = optuna().storages.RDBStorage(f"sqlite:///{part}")
    _add(optuna().create_study(study_name="search", storage=storage), space, known)
    storage.engine.dispose()
    os.replace(part, file)


def _add(study: Any, space: Space, known: Sequence[Known]) -> dict[str, Any]:
    """Add trials to a study: one that did not come to the end is pruned, and TPE ranks it behind
    those that came farther, and one that ended without a loss last. Gives the space as Optuna's."""
    kinds, trials, axes = optuna().distributions, optuna().trial, dict[str, Any]()
    for name, axis in space.axes.items():
        if isinstance(axis, Range):
            kind = kinds.IntDistribution if name in INTEGERS else kinds.FloatDistribution
            axes[name] = kind(axis.low, axis.high, log=True)
        else:
            axes[name] = kinds.CategoricalDistribution(axis)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for values, losses, complete in known:
            made = trials.create_trial(
                params=dict(values),
                distributions=axes,
                intermediate_values=dict(losses),
                state=trials.TrialState.COMPLETE if complete else trials.TrialState.PRUNED,
                value=losses[max(losses)] if complete else None,
            )
            study.add_trial(made)
    return axes


def _key(values: Values) -> tuple[Any, ...]:
    return tuple(values.values())
