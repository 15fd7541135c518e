"""Optuna's part: proposals from known trials and a seed, and study.db."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .trials import INTEGERS, Range, Space, Values

TRIES = 100  # for a new trial


# A trial's values, its losses by rung from 1, and whether it is complete.
Known = tuple[Values, Mapping[int, float], bool]


def optuna() -> Any:
    """Optuna, which only a search needs."""
    try:
        import optuna  # slow to import
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise ValueError("optuna is missing: pip install 'lora-gpt2[search]'.") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def propose(space: Space, n: int, known: list[Known], *, sampler: str, seed: int) -> list[Values]:
    """Values of n new trials, a function of the arguments."""
    kinds = optuna().samplers
    kind = kinds.RandomSampler if sampler == "random" else kinds.TPESampler
    study = optuna().create_study(sampler=kind(seed=seed % 2**32))
    axes = _add(study, space, known)
    proposed, tries = list[Values](), 0
    seen = {tuple(values.values()) for values, _, _ in known}
    while len(proposed) < n:
        asked, tries = study.ask(axes).params, tries + 1
        values: Values = {name: asked[name] for name in space.axes}
        if tries > TRIES * n:  # few are left
            values = next(v for v in space.all() if tuple(v.values()) not in seen)
        if tuple(values.values()) not in seen:
            seen.add(tuple(values.values()))
            proposed.append(values)
    return proposed


def write_study(file: Path, space: Space, known: list[Known]) -> None:
    """Write the study for optuna-dashboard."""
    part = file.with_name(f".{file.name}.part")
    part.unlink(missing_ok=True)
    storage = optuna().storages.RDBStorage(f"sqlite:///{part}")
    _add(optuna().create_study(study_name="search", storage=storage), space, known)
    storage.engine.dispose()
    os.replace(part, file)


def _add(study: Any, space: Space, known: list[Known]) -> dict[str, Any]:
    kinds, trials, axes = optuna().distributions, optuna().trial, dict[str, Any]()
    for name, axis in space.axes.items():
        if isinstance(axis, Range):
            kind = kinds.IntDistribution if name in INTEGERS else kinds.FloatDistribution
            axes[name] = kind(axis.low, axis.high, log=True)
        else:
            axes[name] = kinds.CategoricalDistribution(axis)
    with warnings.catch_warnings(action="ignore"):
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
