"""Ctrl-C at any line of any public verb or context: the model is as before, or as after the call.

Before the first change to the model each line of the code is tried once, from then on each line
event.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import nn

import lora
from tests.toys import MLP, randomize, raw

HOME = str(Path(lora.__file__).parent)
IDS = torch.tensor([[1, 2], [3, 4]])


def bare() -> nn.Module:
    """An embedding, two linear layers (one frozen) and a head that is tied to the embedding."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 4), MLP(4, 4), nn.Linear(4, 5, bias=False)).eval()
    model[2].weight = model[0].weight
    model[1].down.weight.requires_grad_(False)
    return model


def bank() -> nn.Module:
    model = bare()
    lora.inject(model, adapter="a", r=1, targets=("up", "down"), seed=0)
    lora.inject(model, adapter="b", r=1, targets=("up", "2"), seed=1, untie=True)
    lora.activate(model, "a")
    for name in "ab":
        randomize(model, name)
    model[1].up.updates["a"].A.requires_grad_(False)  # as a user may
    return model


def merged() -> nn.Module:
    model = bank()
    lora.merge(model)
    return model


def single() -> nn.Module:
    model = bare()
    lora.inject(model, r=1, targets=("up", "2"), seed=0, untie=True)
    randomize(model)
    return model


def in_context(*contexts: Callable[[nn.Module], object]) -> Callable[[nn.Module], None]:
    def call(model: nn.Module) -> None:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context(model))

    return call


def activated(model: nn.Module):
    return lora.activated(model, {"a": 0.5, "b": 1.0})


def routed(model: nn.Module):
    return lora.routed(model, ["b", None])


VERBS = {
    "inject": (bare, lambda m, _: lora.inject(m, r=1, targets=("up", "down"), seed=0)),
    "inject untied": (
        bare,
        lambda m, _: lora.inject(m, r=1, targets=("up", "2"), seed=0, untie=True),
    ),
    "inject another": (
        bank,
        lambda m, _: lora.inject(m, adapter="c", r=1, targets=("up", "0"), seed=0, untie=True),
    ),
    "eject": (bank, lambda m, _: lora.eject(m)),
    "eject merging": (bank, lambda m, _: lora.eject(m, merge=True)),
    "eject merged": (merged, lambda m, _: lora.eject(m, merge=True)),
    "load": (bare, lambda m, folder: lora.load(m, folder, untie=True)),
    "load another": (bank, lambda m, folder: lora.load(m, folder, untie=True)),
    "save": (bank, lambda m, folder: lora.save(m, folder / "again", adapter="a")),
    "activate": (bank, lambda m, _: lora.activate(m, "b")),
    "activate a mixture": (bank, lambda m, _: lora.activate(m, {"a": 1.0, "b": 0.5})),
    "remove": (bank, lambda m, _: lora.remove(m, "a")),
    "remove the last": (single, lambda m, _: lora.remove(m, "default")),
    "merge": (bank, lambda m, _: lora.merge(m)),
    "merge and verify": (bank, lambda m, _: lora.merge(m, verify=IDS)),
    "unmerge": (merged, lambda m, _: lora.unmerge(m)),
    "implant": (bare, lambda m, folder: lora.algebra.implant(m, value(), "new")),
    "activated": (bank, lambda m, _: in_context(activated)(m)),
    "routed": (bank, lambda m, _: in_context(routed)(m)),
    "disabled": (bank, lambda m, _: in_context(lora.disabled)(m)),
    "merged": (bank, lambda m, _: in_context(lora.merged)(m)),
    "merged already": (merged, lambda m, _: in_context(lora.merged)(m)),
    "disabled, routed, activated": (
        bank,
        lambda m, _: in_context(activated, routed, lora.disabled)(m),
    ),
    "disabled, merged, activated": (
        bank,
        lambda m, _: in_context(activated, lora.merged, lora.disabled)(m),
    ),
}
CONTEXTS = {"activated", "routed", "disabled", "merged", "merged already"}


def value() -> dict[str, lora.algebra.Factors]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(1, 4, generator=generator), torch.randn(4, 1, generator=generator)
    return {path: lora.algebra.Factors(a.double(), b.double()) for path in ("1.up", "1.down")}


def state(model: nn.Module, *, ids: bool) -> dict[str, object]:
    """All of a model to the bit, with the identity of what it is made of or without."""
    found: dict[str, object] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[f"{name}()"] = (type(module), module.training, ids and id(module))
        if isinstance(module, lora.LoRALinear):
            found[f"{name}: state"] = (
                dict(module.active),
                dict(module.resting),
                len(module.pauses),
                module.routing is not None,
                module.merged_weight is not None,
                len(module.origin.thawed),
                len(module.origin.tied),
            )
    for name, p in model.named_parameters(remove_duplicate=False):
        found[name] = (p.requires_grad, p.dtype, raw(p), ids and id(p))
    for name, b in model.named_buffers(remove_duplicate=False):
        found[name] = raw(b)
    return found


class Tracer:
    """Looks at each line event inside lora/, and may raise at the n-th."""

    def __init__(self, at: int = -1, look: Callable[[], bool] | None = None) -> None:
        self.at, self.look = at, look
        self.lines: list[tuple[str, int]] = []
        self.changed: int | None = None  # the first event before which the model had changed

    def __call__(self, frame: FrameType, event: str, _: object):
        if not frame.f_code.co_filename.startswith(HOME):
            return None
        if event == "line":
            self._line(frame)
        return self

    def _line(self, frame: FrameType) -> None:
        number = len(self.lines)
        self.lines.append((frame.f_code.co_filename, frame.f_lineno))
        if self.look is not None and self.changed is None:
            sys.settrace(None)
            self.changed = number if self.look() else None
            sys.settrace(self)
        if number == self.at:
            raise KeyboardInterrupt

    def run(self, call: Callable[[], object]) -> bool:
        """Whether it was interrupted."""
        sys.settrace(self)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False


def events_to_try(trace: Tracer) -> list[int]:
    first = len(trace.lines) if trace.changed is None else max(trace.changed - 1, 0)
    once = {line: number for number, line in reversed(list(enumerate(trace.lines[:first])))}
    return sorted({*once.values(), *range(first, len(trace.lines))})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    lora.save(single(), path)
    return path


@pytest.mark.parametrize("verb", VERBS)
def test_an_interrupt_at_any_line_leaves_the_model_as_before_or_as_after(verb, folder):
    build, call = VERBS[verb]
    model = build()
    before = state(model, ids=True)
    trace = Tracer(look=lambda: state(model, ids=True) != before)
    assert not trace.run(lambda: call(model, folder))
    is_context = verb in CONTEXTS or "," in verb
    after = state(model, ids=False)
    if is_context:
        assert state(model, ids=True) == before
    model, tried = build(), 0
    before = state(model, ids=True)
    for number in events_to_try(trace):
        interrupted = Tracer(at=number).run(lambda: call(model, folder))  # noqa: B023
        tried += interrupted
        if state(model, ids=True) == before:
            continue
        where = f"event {number}: {trace.lines[number]}"
        if is_context or state(model, ids=False) != after:
            gc.collect()  # whatever still waits for its end
            assert state(model, ids=is_context) == (before if is_context else after), where
        model = build()
        before = state(model, ids=True)
    assert tried > 5
