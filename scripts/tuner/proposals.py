"""What Optuna is used for: it proposes trials, and keeps a study that optuna-dashboard opens.

Optuna stores no sampler's state. So each wave has a study of its own in memory, made anew of what
is known, and a sampler whose seed is the search's and the wave's: proposals are a function of them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .space import INTEGERS, Range, Space, Value, Values

SAMPLERS = ("random", "tpe")
TRIES = 100  # proposals for a trial that stands in no earlier one


@dataclass(frozen=True, kw_only=True)
class Known:
    """A trial with its losses by rung, from 1; none of one that ended, which is the worst."""

    values: Values
    losses: Mapping[int, float]
    complete: bool = False


def optuna() -> Any:
    """Optuna, which only a search needs.

    Raises:
        ValueError: it is missing.
    """
    try:
        import optuna  # slow to import
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise ValueError("optuna is missing: pip install 'lora-gpt2[search]'.") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def propose(
    space: Space, n: int, known: Sequence[Known], *, sampler: str, seed: int, wave: int
) -> list[dict[str, Value]]:
    """Values of so many trials, none of which is known; a function of the arguments.

    Args:
        space: has at least so many that are not known.
        n: how many.
        known: what was found; TPE learns from it.
        sampler: "random" or "tpe".
        seed, wave: of the search and, from 0, of its waves.
    """
    samplers, own = optuna().samplers, seed * 1_000_003 + wave
    made = (
        samplers.RandomSampler(seed=own % 2**32)
        if sampler == "random"
        else samplers.TPESampler(seed=own % 2**32)
    )
    study, axes = optuna().create_study(sampler=made), _distributions(space)
    study.add_trials([_frozen(axes, trial) for trial in known])
    seen, found = {_key(trial.values) for trial in known}, list[dict[str, Value]]()
    tries = 0
    while len(found) < n:
        values = study.ask(axes).params
        tries += 1
        if _key(values) in seen and tries > TRIES * n:  # few are left: take the first
            values = next(v for v in space.all() if _key(v) not in seen)
        if _key(values) not in seen:
            seen.add(_key(values))
            found.append({name: values[name] for name in space.axes})
    return found


def write_study(file: Path, space: Space, known: Sequence[Known]) -> None:
    """Write the study anew, in the file that optuna-dashboard opens; whole or not at all."""
    made = file.with_name(f".{file.name}.part")
    made.unlink(missing_ok=True)
    axes = _distributions(space)
    storage = optuna().storages.RDBStorage(f"sqlite:///{made}")
    study = optuna().create_study(study_name="search", storage=storage)
    study.add_trials([_frozen(axes, trial) for trial in known])
    storage.engine.dispose()
    os.replace(made, file)


def _distributions(space: Space) -> dict[str, Any]:
    kinds = optuna().distributions
    found: dict[str, Any] = {}
    for name, axis in space.axes.items():
        if isinstance(axis, Range):
            kind = kinds.IntDistribution if name in INTEGERS else kinds.FloatDistribution
            found[name] = kind(axis.low, axis.high, log=True)
        else:
            found[name] = kinds.CategoricalDistribution(axis)
    return found


def _frozen(axes: Mapping[str, Any], trial: Known) -> Any:
    """A trial as Optuna has it: one that did not come to the end is pruned, and TPE ranks it
    behind those that came farther, and one that ended without a loss last."""
    trials = optuna().trial
    state = trials.TrialState.COMPLETE if trial.complete else trials.TrialState.PRUNED
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trials.create_trial(
            params=dict(trial.values),
            distributions=dict(axes),
            intermediate_values=dict(trial.losses),
            state=state,
            value=trial.losses[max(trial.losses)] if trial.complete else None,
        )


def _key(values: Values) -> tuple[Value, ...]:
    return tuple(values.values())
