"""Values to every public name, in every state: an error that says why, and nothing changed.

`FUZZ_CASES=20000 pytest tests/test_fuzz.py` looks longer; `FUZZ_SEED` draws others.
"""

from __future__ import annotations

import copy
import os
import random
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gpt2
import lora
from tests.toys import MLP, randomize, snapshot

CASES = int(os.environ.get("FUZZ_CASES", "2400"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
PARTS = 8
PYTHONS = re.compile(r"\(\) (missing|takes|got) |(str|bytes) (object )?or (an )?os.PathLike object")

ODD: list[Any] = [
    None, True, 0, 1, -1, 2, 2**31, 0.5, -0.0, float("nan"), float("inf"), 1j,
    "", " ", "default", "a", "other", "a.b", "(", "a+", "up[q", "up[q,q]", "[", "]",
    "all-linear", ".*", "forward", "0", "up", b"a", [], [1], [None], ["a"], [""], [[]], (), (1, 2),
    {}, {"a": 1}, {"default": float("nan")}, {1: 2}, {"up": 0}, {"up": {}}, set(), {1}, range(3),
    object(), type, len, Ellipsis, torch.float32, torch.int8, torch.float16, torch.device("meta"),
    torch.tensor(1.0), torch.zeros(2, 3), torch.zeros(0), nn.Linear(2, 2), Path("/nowhere"), Path(),
    ("a",) * 2,
]  # fmt: skip


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), MLP(6, 4), gpt2.Conv1D(6, 9)).eval()
    nn.init.normal_(model[2].weight)
    model[2].slices = ("q", "k", "v")
    return model


def injected(**settings: Any) -> nn.Module:
    model = net()
    for name in ("default", "a"):
        lora.inject(model, adapter=name, r=2, seed=0, **{"targets": ("up", "2"), **settings})
        randomize(model, name)
    return model


def after(verb: Callable[[nn.Module], object], **settings: Any) -> nn.Module:
    model = injected(**settings)
    verb(model)
    return model


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9, bias=False))
    model[1].weight = model[0].weight
    return model


def made_for_inference() -> nn.Module:
    with torch.inference_mode():
        return net()


STATES: dict[str, Callable[[], Any]] = {
    "bare": net,
    "injected": injected,
    "training": lambda: injected(dropout=0.5).train(),
    "one": lambda: after(lambda m: lora.remove(m, "a")),
    "merged": lambda: after(lora.merge),
    "ejected": lambda: after(lora.eject),
    "meta": lambda: injected().to("meta"),
    "born meta": lambda: net().to("meta"),
    "half": lambda: injected().half(),
    "double": lambda: injected().double(),
    "copied": lambda: copy.deepcopy(after(lora.merge)),
    "embedding": lambda: injected(targets=("0", "up")),
    "sliced": lambda: injected(targets=("2[q,v]", "down")),
    "tied": tied,
    "for inference": made_for_inference,
    "layer": lambda: nn.Linear(4, 4),
    "adapted layer": lambda: injected()[1].up,
    "empty": nn.Module,
    "compiled": lambda: torch.compile(injected(), backend="eager"),
    "parallel": lambda: nn.DataParallel(injected()),
    "infinite": lambda: after(lambda m: m[1].up.updates["default"].B.data.fill_(torch.inf)),
    "no module": lambda: 3,
}
CONTEXTS: dict[str, Callable[[Any], AbstractContextManager[object]]] = {
    "": lambda _: ExitStack(),
    "routed": lambda m: lora.routed(m, ["default", None]),
    "disabled": lora.disabled,
    "activated": lambda m: lora.activated(m, "a"),
    "inference": lambda _: torch.inference_mode(),
    "no grad": lambda _: torch.no_grad(),
    "autocast": lambda _: torch.autocast("cpu", torch.bfloat16),
}
INJECT: dict[str, list[Any]] = {
    "adapter": ["new", "b", "default"],
    "r": [1, 2, 3, 50],
    "alpha": [1, 16.0, 1e38],
    "dropout": [0.0, 0.3],
    "targets": ["up", ("up", "2"), "all-linear", "2[q,v]", r".*\.(up|down)", "0"],
    "exclude": [(), "down", "2"],
    "layers": [None, [1], (1, 2)],
    "rank_pattern": [None, {"up": 1}],
    "alpha_pattern": [None, {"up": 3.0}],
    "slices": [None, ("q", "k", "v"), {"q": 4, "k": 5}],
    "rslora": [True, False],
    "seed": [None, 0, 3],
    "dtype": [None, torch.float64, torch.float16],
}


def a_value(r: int = 1) -> dict[str, lora.algebra.Factors]:
    return {"1.up": lora.algebra.Factors(torch.ones(r, 6).double(), torch.ones(4, r).double())}


VALUES: list[Any] = [
    a_value(), a_value(3), {"nowhere": a_value()["1.up"]},
    {"1.up": lora.algebra.Factors(torch.ones(2, 6), torch.full((4, 2), torch.nan))},
    {"2": lora.algebra.Factors(torch.ones(1, 6).half(), torch.full((9, 1), 6e4).half())},
]  # fmt: skip
ODD += [
    {"1.up": 3}, {3: a_value()["1.up"]},
    {"1.up": lora.algebra.Factors(torch.ones(2, 5), torch.ones(4, 1))},
    {"1.up": lora.algebra.Factors(torch.ones(6), torch.ones(4, 1))},
    {"1.up": lora.algebra.Factors(torch.ones(1, 6).int(), torch.ones(4, 1).int())},
    {"1.up": torch.ones(4)}, {"1.up": torch.full((4, 6), torch.nan)}, {"1.up": "x"},
]  # fmt: skip
DENSE: list[Any] = [{"1.up": torch.ones(4, 6)}, {}]
FOLDERS = ["{saved}", "{saved}", "{empty}", "{file}", "{broken}", "nowhere"]
A = lora.algebra
# A call: what it is, whether the first argument is the model, and sound values of the others.
CALLS: dict[str, tuple[Callable[..., Any], bool, dict[str, list[Any]]]] = {
    "inject": (lora.inject, True, INJECT),
    "inject a config": (lora.inject, True, {"config": [lora.LoRAConfig(targets="up"), None]}),
    "inject, PEFT's words": (lora.inject, True, {"lora_alpha": [1], "target_modules": ["up"]}),
    "eject": (lora.eject, True, {"merge": [True, False]}),
    "activate": (lora.activate, True, {"mixture": ["a", {"a": 1.0, "default": 0.5}, {}]}),
    "remove": (lora.remove, True, {"adapter": ["a", "default"]}),
    "merge": (lora.merge, True, {}),
    "unmerge": (lora.unmerge, True, {}),
    "is_merged": (lora.is_merged, True, {}),
    "active": (lora.active, True, {}),
    "adapters": (lora.adapters, True, {}),
    "base_state_dict": (lora.base_state_dict, True, {}),
    "count_parameters": (lora.count_parameters, True, {}),
    "trainable_parameters": (lora.trainable_parameters, True, {}),
    "parameter_groups": (lora.parameter_groups, True, {"lr": [1e-3], "b_ratio": [16.0]}),
    "save": (
        lora.save, True,
        {"folder": ["{new}"], "adapter": ["default", "a"], "notes": [None, {"data": "a.csv"}]},
    ),
    "load": (
        lora.load, True,
        {"folder": FOLDERS, "adapter": ["new", "a"], "allow_base_mismatch": [True, False],
         "dtype": [None, torch.float64]},
    ),
    "activated": (lora.activated, True, {"mixture": ["a", {"a": 0.5}]}),
    "routed": (lora.routed, True, {"rows": [["a", None], [{"a": 1.0}, "default"]]}),
    "disabled": (lora.disabled, True, {}),
    "merged": (lora.merged, True, {}),
    "LoRALinear": (lora.LoRALinear, False, {"base": [nn.Linear(3, 3)]}),
    "LoRAConfig": (lora.LoRAConfig, False, {k: v for k, v in INJECT.items() if k != "adapter"}),
    "UpdateConfig": (
        lora.UpdateConfig, False, {"r": [1], "alpha": [1], "dropout": [0.0], "rslora": [False]},
    ),
    "factors": (A.factors, True, {"adapter": ["default", "a"]}),
    "implant": (A.implant, True, {"value": VALUES, "adapter": ["new", "a"]}),
    "extract": (
        A.extract, True,
        {"tuned": [net(), injected()], "r": [1, 2], "targets": ["up", "all-linear"]},
    ),
    "read": (A.read, False, {"folder": FOLDERS}),
    "add": (lambda v, w: A.add(v, w), False, {"v": VALUES, "w": VALUES}),
    "subtract": (A.subtract, False, {"value": VALUES, "other": VALUES}),
    "scale": (A.scale, False, {"value": VALUES, "factor": [0.5, -1]}),
    "compress": (A.compress, False, {"value": VALUES, "r": [1, 2]}),
    "approximate": (A.approximate, False, {"changes": DENSE, "r": [1, 2]}),
    "ties": (
        A.ties, False,
        {"values": [[a_value()], VALUES[:2]], "density": [0.5, 1], "weights": [None]},
    ),
    "dare": (
        A.dare, False,
        {"values": [[a_value()], VALUES[:2]], "density": [0.5], "weights": [None], "seed": [0, 1]},
    ),
}  # fmt: skip


class Fuzz:
    """Draws cases and judges them; a model is built anew only when a call changed it."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.rng = random.Random(seed)
        self.models: dict[str, Any] = {}
        self.places = {name: str(folder / name) for name in ("saved", "empty", "new", "broken")}
        self.places["file"] = str(folder / "saved" / "adapter_config.json")
        lora.save(injected(), folder / "saved")
        (folder / "empty").mkdir()
        (folder / "broken").mkdir()
        (folder / "broken" / "adapter_config.json").write_text("[1")

    def value(self, sound: list[Any], odd: float) -> Any:
        if self.rng.random() < odd:
            value = self.rng.choice(ODD)
            wrap = self.rng.random()
            return [value] if wrap < 0.1 else {"up": value} if wrap < 0.15 else value
        value = self.rng.choice(sound)
        return value.format(**self.places) if isinstance(value, str) and "{" in value else value

    def case(self) -> str | None:
        """Run one; what is wrong, or None."""
        name = self.rng.choice(list(CALLS))
        call, takes_model, sound = CALLS[name]
        odd = self.rng.choice([0.0, 0.1, 0.3, 0.7])
        given = {k: self.value(v, odd) for k, v in sound.items() if self.rng.random() < 0.8}
        if self.rng.random() < 0.03:
            given[self.rng.choice(["rank", "targts"])] = 1
        strict = not odd
        if not takes_model:
            return self.judged(name, given, lambda: call(**given), lambda: (), strict)
        state, context = self.rng.choice(list(STATES)), self.rng.choice(list(CONTEXTS))
        if state not in self.models:
            self.models[state] = STATES[state]()
        model = self.models[state]
        what = f"{name} on {state!r} in {context!r}"
        entered = ExitStack()
        try:
            entered.enter_context(CONTEXTS[context](model))
        except Exception:
            return None  # such a context cannot be entered in this state
        is_module = isinstance(model, nn.Module)

        def run() -> None:
            result = call(model, **given)
            if isinstance(result, AbstractContextManager):
                with result:
                    pass
            elif name not in ("is_merged", "active", "adapters"):
                self.models.pop(state)  # it may have changed

        with entered:
            look = (lambda: snapshot(model)) if is_module else lambda: ()
            return self.judged(what, given, run, look, strict)

    def judged(
        self,
        what: str,
        given: dict[str, Any],
        run: Callable[[], Any],
        look: Callable[[], Any],
        strict: bool,
    ) -> str | None:
        shown = {k: repr(v)[:60] for k, v in given.items()}
        before = look()
        try:
            run()
        except Exception as error:
            if fault := fault_of(error, strict):
                return f"{what}: {shown}: {fault}"
            if look() != before:
                self.models.clear()
                return f"{what}: {shown}: the model changed ({error})"
        return None


def fault_of(error: Exception, strict: bool) -> str | None:
    """What is wrong with an error; values that nobody gives may have Python's or torch's own."""
    message = str(error)
    kind = f"{type(error).__name__}: {message[:300]}"
    if not strict:
        return kind if isinstance(error, (AssertionError, NameError, RecursionError)) else None
    if isinstance(error, TypeError):  # of Python's signatures and paths, or a keyword of ours
        return None if PYTHONS.search(message) or raised_in(error, "config_of") else kind
    if not isinstance(error, (ValueError, RuntimeError, OSError)):
        return kind
    if len(message) < 15 or (len(message) > 2000 and not isinstance(error, OSError)):
        return f"{len(message)} characters: {kind}"
    return None


def raised_in(error: Exception, *functions: str) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_name in functions


@pytest.mark.parametrize("part", range(PARTS))
def test_odd_values_in_odd_states_give_an_error_that_says_why(part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fuzz = Fuzz(SEED * PARTS + part, tmp_path)
    found = [fault for _ in range(CASES // PARTS) if (fault := fuzz.case())]
    assert not found, f"{len(found)} faults:\n" + "\n".join(found[:40])
