"""What decides a training: the options that train_qa and a search have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

from jsonargparse import ArgumentParser, Namespace

import gpt2
import lora
from lora.config import as_names

from ..cli import cli
from ..cli import options as opts
from ..tuner.space import Range, Space, Values, names_of
from . import inputs


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An adapter and how it is trained.

    Args:
        adapter: what is injected.
        training: how it is trained; its seed is the adapter's too.
        b_ratio: learning rate of B over that of A (LoRA+).
    """

    adapter: lora.LoRAConfig
    training: gpt2.TrainConfig
    b_ratio: float

    def seeded(self, seed: int) -> Recipe:
        """The same with another seed: of the first A, the order of the data, and dropout."""
        return replace(
            self,
            adapter=replace(self.adapter, seed=seed),
            training=replace(self.training, seed=seed),
        )

    def varied(self, values: Values) -> Recipe:
        """The same with what a trial has of a space; where r varies, alpha / r stays."""
        given: dict[str, Any] = dict(values)
        r, own = given.pop("r", self.adapter.r), dict[str, Any]()
        ratio = given.pop("alpha_over_r", self.adapter.alpha / self.adapter.r)
        if {"r", "alpha_over_r"} & {*values}:
            own = {"r": r, "alpha": ratio * r}
        if "dropout" in given:
            own["dropout"] = given.pop("dropout")
        if "targets" in given:
            own["targets"] = tuple(names_of(given.pop("targets")))
        b_ratio = given.pop("b_ratio", self.b_ratio)
        for name, other in (("steps", "epochs"), ("epochs", "steps")):
            if name in values:
                given[other] = None
        return Recipe(
            adapter=replace(self.adapter, **own),
            training=replace(self.training, **given),
            b_ratio=b_ratio,
        )

    def values(self, of: Sequence[str]) -> dict[str, Any]:
        """What it has of a space, by name."""
        adapter, training = self.adapter, self.training
        own = {
            "b_ratio": self.b_ratio,
            "r": adapter.r,
            "alpha_over_r": adapter.alpha / adapter.r,
            "dropout": adapter.dropout,
            "targets": list(as_names(adapter.targets)),
        }
        return {name: own[name] if name in own else getattr(training, name) for name in of}


def room(space: Space, usual: Recipe, side: int | None = None) -> lora.LoRAConfig:
    """The adapter in whose place every trial's fits, and the usual one.

    Args:
        space: what varies.
        usual: what does not.
        side: the largest rank that fits the layers; None leaves ranks out of account.
    """
    adapter = usual.adapter
    axis = space.axes.get("r", ())
    ranks = [adapter.r, *(adapter.rank_pattern or {}).values()]
    if isinstance(axis, Range):
        ranks.append(int(axis.high) if side is None else min(int(axis.high), side))
    else:
        ranks += [rank for rank in axis if isinstance(rank, int)]
    r = 1 if side is None else max((rank for rank in ranks if rank <= side), default=1)
    targets = dict.fromkeys([*as_names(adapter.targets), *space.targets()])
    dropout = max(adapter.dropout, space.ends("dropout", adapter.dropout)[1])
    return replace(
        adapter, r=r, targets=tuple(targets), dropout=dropout, rank_pattern=None,
        alpha_pattern=None, seed=0,
    )  # fmt: skip


def add_options(to: ArgumentParser, data: str) -> None:
    """Base, data, training and adapter, under the names and defaults that the library gives."""
    add = to.add_argument
    add("--model_name", type=str, default="demo", help="demo, gpt2, org/repo, a folder or a file")
    add("--base_dropout", type=float | None, help="the base's own dropouts; by default as it says")
    add("--device", type=str | None, help="by default the GPU if there is one")
    add("--data", type=str, default=data, help=inputs.FORMATS)
    add("--fields", type=dict[str, str] | None, help="--fields.question NAME: the data's own names")
    longest = signature(gpt2.encode).parameters["max_length"].default
    batch = gpt2.TrainConfig.batch_size
    add("--max_token_length", type=int, default=longest, help="longer examples are cut")
    add("--train_batch_size", type=int, default=batch, help="examples a batch")
    to.add_function_arguments(
        gpt2.encode, skip={"examples", "tokenizer", "max_length"}, as_group=False
    )
    to.add_class_arguments(gpt2.TrainConfig, skip={"batch_size"}, as_group=False)
    add("--b_ratio", type=float, default=1.0, help="learning rate of B over that of A (LoRA+)")
    opts.add_lora(to)


def check(options: Namespace, least: dict[str, int]) -> None:
    """Raise a ValueError where a count, or the ratio, is too small."""
    for name, low in ({"max_token_length": 2} | least).items():
        if options[name] < low:
            raise ValueError(f"{name} must be at least {low}, got {options[name]}.")
    if options.b_ratio <= 0:
        raise ValueError(f"b_ratio must be above 0, got {options.b_ratio}.")


def training(options: Namespace) -> gpt2.TrainConfig:
    """How the options say to train."""
    return cli.build(gpt2.TrainConfig, options, batch_size=options.train_batch_size)


def of(options: Namespace) -> Recipe:
    """What the options say."""
    adapter = {name: value for name, value in options.lora.items() if name != "untie"}
    return Recipe(
        adapter=lora.LoRAConfig(seed=options.seed, **adapter),
        training=training(options),
        b_ratio=options.b_ratio,
    )
