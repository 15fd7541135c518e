"""Whether a search may begin, or go on: its space, its plan, its room in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

import gpt2
import lora
from gpt2.training import fingerprints
from gpt2.training.population import PopulationTraining

from ..runs import folder, processes, recipe, results, starting, stopping, validation
from ..runs.inputs import Reader
from ..runs.recipe import Recipe
from ..runs.validation import Apart
from . import memory
from . import space as spaces
from .halving import Halving
from .plan import Plan
from .proposals import SAMPLERS
from .space import NAMES, Space
from .wave_files import FOLDER, MADE_OF, WaveFiles
from .waves import Waves

__all__ = ["NAMES", "about", "check", "checked", "files", "planned", "resumable", "told", "waves"]

MOST = 1_000_000  # trials, which all are held in memory


def checked(options: Namespace) -> Space:
    """The space, if the options do not contradict it or one another.

    Raises:
        ValueError: they do.
    """
    if options.sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {options.sampler!r}.")
    if options.validation is None:
        raise ValueError("A search chooses by validation data: give --validation.")
    validation.shares(options)
    if options.trials > MOST:
        raise ValueError(f"trials must be at most {MOST:,}, got {options.trials:,}.")
    space = spaces.read(options.space, options.trials)
    if options.sampler == "tpe" and options.trials <= options.slots:
        raise ValueError(
            f"tpe learns from wave to wave, and all {options.trials} trials fit in one of "
            f"{options.slots} slots: give fewer slots, more trials, or take random."
        )
    return space


def check(options: Namespace) -> None:
    """Find out, and write nothing, whether the search may be begun or gone on with.

    Raises:
        FileNotFoundError: there is nothing to go on with.
        ValueError: the folder holds a run; another one works there.
    """
    if processes.size() > 1 and options.res_path is None and not options.resume:
        raise ValueError("Several processes share a folder: name it with --res_path.")
    if processes.is_restart() and not options.resume:
        options.resume = (Path(options.res_path or "") / FOLDER / MADE_OF).is_file()
        options.overwrite = not options.resume

    def may_go_on(place: Path) -> None:
        if not (place / FOLDER / MADE_OF).is_file():
            raise FileNotFoundError(
                f"{place} holds no search to go on with: none was begun there, or it came to its "
                "end."
            )

    starting.check_folder(options, "search", [folder.WINNER], may_go_on)


def planned(options: Namespace, space: Space, apart: Apart) -> Plan:
    """The plan, if its rungs fit the shortest schedule.

    Raises:
        ValueError: they do not.
    """
    usual = recipe.of(options)
    halving = Halving(trials=options.trials, rungs=options.rungs, keep=options.keep)
    if usual.training.schedule == "constant":  # no rate will fall
        halving = replace(halving, cooldown=0)
    least = min(_totals(space, usual, apart.learnt))
    faults = halving.faults(least, options.finalists)
    if not faults and halving.cooldown_steps(0, least):
        first, warmup = halving.step(0, least), usual.training.warmup_steps or 0
        if warmup >= first:  # no copy's rate would fall
            faults = [f"the first ends after {first:,} steps and the warm-up takes {warmup:,}"]
    if faults:
        raise ValueError(f"The rungs do not fit: {'; '.join(faults)}.")
    return Plan(
        space=space,
        usual=usual,
        halving=halving,
        slots=options.slots,
        sampler=options.sampler,
        finalists=options.finalists,
        seeds=options.seeds,
    )


def waves(plan: Plan, model: gpt2.GPT2, apart: Apart) -> Waves:
    """What trains, if the targets are there and the slots fit in memory.

    Raises:
        ValueError: they do not.
    """
    smallest = lora.Population(model, 1, recipe.room(plan.space, plan.usual))
    side = min(min(la.A.shape[2], la.B.shape[1]) for la in smallest.layers.values())
    PopulationTraining(model, smallest, apart.learnt, plan.usual.training)  # raises what it lacks
    smallest.eject()
    assert apart.held_out is not None
    room, config = recipe.room(plan.space, plan.usual, side), plan.usual.training
    slots, tokens = min(plan.slots, plan.halving.trials), config.batch_size * apart.learnt.longest
    memory.check(model, slots, smallest.flat.shape[1] * room.r, tokens, config)
    return Waves(model, apart.learnt, apart.held_out, plan.usual.training, room)


def files(place: Path, options: Namespace, plan: Plan, model: gpt2.GPT2, apart: Apart) -> WaveFiles:
    """The files of the search, begun or found to be of this very search.

    Raises:
        ValueError: they are of another.
    """
    found, is_first = WaveFiles(place), not processes.rank()
    training, halving = plan.usual.training, plan.halving
    made_of = fingerprints.of_run(model, apart.learnt, training, apart.held_out)
    for name in ("modules", "trained parameters"):
        del made_of[name]
    made_of |= {
        "test data": repr(apart.tested and apart.tested.fingerprint[:16]),
        "space": repr(options.space),
        "adapter": repr(plan.usual.adapter),
        "base dropout": repr(options.base_dropout),
        "processes": repr(processes.size()),
    }
    numbers = {"trials": halving.trials, "rungs": halving.rungs, "keep": halving.keep}
    numbers |= {name: getattr(plan, name) for name in ("slots", "finalists", "seeds")}
    numbers |= {"sampler": plan.sampler, "b_ratio": plan.usual.b_ratio}
    made_of |= {name: repr(value) for name, value in numbers.items()}
    for firsts in (True, False):  # those of other hosts must not meet the search that is replaced
        with processes.agreed():
            if firsts and is_first and not options.resume:
                found.remove()
            if firsts == is_first:
                found.begin(made_of)
    return found


@contextmanager
def resumable(place: Path) -> Iterator[None]:
    """What is stopped within says how to go on."""
    try:
        yield
    except (KeyboardInterrupt, OSError) as stop:  # such as a full disk
        stopping.leaving()
        stop.add_note(f"Go on with --resume {place}.")
        raise


def told(plan: Plan, apart: Apart) -> str:
    """What the search is going to do."""
    halving = plan.halving
    alive, whole = "/".join(map(str, halving.alive)), halving.keep ** (halving.rungs - 1)
    shares = "/".join(
        f"{100 * halving.step(rung, whole) / whole:.3g}" for rung in range(halving.rungs)
    )
    return (
        f"{len(apart.learnt):,} examples, {apart.learnt.n_tokens:,} tokens.{apart.told} "
        f"{alive} trials train to {shares} % of their schedules, {plan.slots} at a time; then "
        f"{plan.finalists} finalists and the default configuration over {plan.seeds} seeds."
    )


def about(reader: Reader, apart: Apart, clock: results.Clock, place: Path) -> dict[str, Any]:
    """What is known of a search but for what came out."""
    ids, asked = apart.learnt[0][0].tolist(), int(apart.learnt.prompts[0])
    prompt = reader.tokenizer.decode(ids[: asked or 8])
    of = {"training": apart.learnt, "selection": apart.held_out, "test": apart.tested}
    return {
        "kind": "search",
        "config": {k: v for k, v in reader.options.as_dict().items() if k != "config"},
        "device": str(next(reader.model.parameters()).device),
        "machine": results.machine(reader.model),
        "commands": folder.of_winner(place, reader.options.model_name, prompt),
        "data": {
            name: data and {"examples": len(data), "tokens": data.n_tokens}
            for name, data in of.items()
        },
        "seconds": clock.laps,
    }


def _totals(space: Space, usual: Recipe, learnt: gpt2.Dataset) -> list[int]:
    """The steps of the shortest and of the longest schedule."""
    found = [gpt2.total_steps(learnt, usual.training)]
    for name in ("steps", "epochs"):
        if name in space.axes:
            recipes = [usual.varied({name: int(end)}) for end in space.ends(name, 1)]
            found = [gpt2.total_steps(learnt, own.training) for own in recipes]
    return found
