"""Any sequence of operations, checked after each step against a dense model kept beside it.

`STATE_MACHINE_EXAMPLES=500 pytest tests/test_state_machine.py` looks longer.
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import lora
from tests.toys import layer, raw, snapshot

NAMES = ("legal", "poet", "a b")
ROWS = 3
WIDTH = {"first": (5, 6), "wide": (6, 6), "last": (6, 4)}  # in, out
TARGETS = {  # what to ask for -> the layers it reaches, each with the rows of its output
    "first": {"first": [(0, 6)]},
    "wide": {"wide": [(0, 6)]},
    "wide[q,v]": {"wide": [(0, 2), (4, 6)]},
    "wide[k]": {"wide": [(2, 4)]},
    "all-linear": {"first": [(0, 6)], "wide": [(0, 6)], "last": [(0, 4)]},
}
names = st.sampled_from(NAMES)
weights = st.sampled_from([1.0, -0.5, 0.25, 0.0, 2.0])
often = st.integers(0, 7).map(bool)


class Mixed(nn.Module):
    """Linear and Conv1D layers, one of them called twice under two names, one frozen before."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = layer("linear", *WIDTH["first"], dtype)
        self.wide = layer("conv1d", *WIDTH["wide"], dtype)
        self.wide.slices = ("q", "k", "v")
        self.again = self.wide
        self.last = layer("conv1d", *WIDTH["last"], dtype)
        self.last.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.again(torch.tanh(self.wide(h)))))


@dataclass
class Share:
    """What one adapter adds to one layer, by the formula: for each block of rows an A and a B."""

    rows: list[tuple[int, int]]
    a: list[Tensor]
    b: list[Tensor]
    scaling: float

    def delta(self, n_in: int, n_out: int) -> Tensor:
        out = torch.zeros(n_out, n_in, dtype=torch.float64)
        for (start, stop), a, b in zip(self.rows, self.a, self.b, strict=True):
            out[start:stop] = self.scaling * (b.double() @ a.double())
        return out


class Machine(RuleBasedStateMachine):
    @initialize(
        dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
        seed=st.integers(0, 99),
        sliced=st.sampled_from(["wide[q,v]", "wide[k]"]),
    )
    def start(self, dtype: torch.dtype, seed: int, sliced: str) -> None:
        torch.manual_seed(seed)
        self.dtype = dtype
        self.model = Mixed(dtype).eval()
        self.twin = copy.deepcopy(self.model)
        self.x = torch.randn(ROWS, 2, 5).to(dtype)
        self.base = {k: raw(v) for k, v in self.twin.state_dict().items()}
        self.thawed = {n for n, p in self.twin.named_parameters() if p.requires_grad}
        self.born = snapshot(self.model)
        self.bank: dict[str, dict[str, Share]] = {}
        self.active: dict[str, float] = {}
        self.merged = False
        self.rows: list | None = None  # the routing in force
        self.stack = ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.route = ExitStack()
        self.saved: dict[str, dict[str, Share]] = {}
        # Two adapters to begin with: few steps are wasted on getting to where things go wrong.
        self.add(NAMES[0], "all-linear", 2, 4.0, False, seed, True)
        self.add(NAMES[1], sliced, 1, 1, True, seed + 1, True)

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.route.close()
            self.stack.close()

    # What is expected

    def attempt(self, call, *, allowed: bool, error=RuntimeError) -> bool:
        """Run the call; when it is not allowed it must raise and leave everything as it was."""
        if allowed:
            call()
            return True
        before = snapshot(self.model)
        with pytest.raises(error):
            call()
        assert snapshot(self.model) == before
        return False

    @property
    def settled(self) -> bool:
        return not self.merged and self.rows is None

    def mixture(self, data):
        """What to ask for: now and then an adapter that is not there."""
        named = st.sampled_from(sorted(self.bank) if data.draw(often) else NAMES)
        return data.draw(st.one_of(named, st.dictionaries(named, weights, max_size=3)))

    def weights(self, mixture) -> dict[str, float]:
        return {mixture: 1.0} if isinstance(mixture, str) else dict(mixture or {})

    def in_force(self, mixture: dict[str, float], path: str) -> Tensor:
        n_in, n_out = WIDTH[path]
        delta = torch.zeros(n_out, n_in, dtype=torch.float64)
        for name, weight in mixture.items():
            if path in self.bank[name]:
                delta += weight * self.bank[name][path].delta(n_in, n_out)
        return delta

    def reference(self, x: Tensor, mixture: dict[str, float]) -> tuple[Tensor, Tensor]:
        """The dense float64 model, and how large rounding errors in its output can grow."""
        h, size = x.double(), x.double().abs()
        for path in ("first", "wide", "wide", "last"):
            base = getattr(self.twin, path)
            weight = base.weight.detach().double()
            weight = weight if isinstance(base, nn.Linear) else weight.t()
            bias = base.bias.detach().double()
            steps = weight.abs()
            for name, w in mixture.items():  # absolute values: what cancels still rounds
                if path in self.bank[name]:
                    share = self.bank[name][path]
                    sizes = Share(
                        share.rows, [a.abs() for a in share.a], [b.abs() for b in share.b], 1.0
                    )
                    steps = steps + abs(w) * share.scaling * sizes.delta(*WIDTH[path])
            h = h @ (weight + self.in_force(mixture, path)).t() + bias
            size = size @ steps.t() + bias.abs()
            if path != "last":
                h = torch.tanh(h)
        return h, size

    def agrees(self, y: Tensor, x: Tensor, mixture: dict[str, float]) -> None:
        want, size = self.reference(x, mixture)
        # Four layers of at most eight roundings each, half a unit every one.
        slack = 16 * torch.finfo(self.dtype).eps * size + torch.finfo(self.dtype).tiny
        assert y.dtype == self.dtype
        assert ((y.detach().double() - want).abs() <= slack).all()

    @invariant()
    def everything_holds(self) -> None:
        if not hasattr(self, "bank"):
            return
        with torch.no_grad():
            y = self.model(self.x)
            for row in range(ROWS):
                mixture = self.active if self.rows is None else self.weights(self.rows[row])
                self.agrees(y[row], self.x[row], mixture)
        base = self.model.state_dict() if not self.bank else lora.base_state_dict(self.model)
        assert {k: raw(v) for k, v in base.items()} == self.base
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, lora.LoRALinear)}
        assert set(layers) == {path for shares in self.bank.values() for path in shares}
        trained = {n for n, p in self.model.named_parameters() if p.requires_grad}
        if not self.bank:
            assert trained == self.thawed
            with pytest.raises(RuntimeError, match="carries no adapter"):
                lora.adapters(self.model)
            return
        assert trained == {  # contexts do not change what is trained
            f"{path}.updates.{name}.{f}"
            for name in self.active
            for path in self.bank[name]
            for f in "AB"
        }
        parameters = dict(self.model.named_parameters())
        assert not any(p.grad is not None for n, p in parameters.items() if "updates" not in n)
        for module in layers.values():
            assert module.enabled
            assert (module.merged is not None) == self.merged
            assert (module.routing is not None) == (self.rows is not None)
        assert self.model.again is self.model.wide
        assert lora.is_merged(self.model) == self.merged
        assert lora.active(self.model) == self.active
        have = lora.adapters(self.model)
        assert {n: set(paths) for n, paths in have.items()} == {
            n: set(shares) for n, shares in self.bank.items()
        }
        with lora.disabled(self.model), torch.no_grad():
            assert raw(self.model(self.x)) == raw(self.twin(self.x))

    # What can happen

    @rule(
        name=names,
        where=st.sampled_from(list(TARGETS)),
        r=st.integers(1, 2),
        alpha=st.sampled_from([1, 4.0]),
        rslora=st.booleans(),
        seed=st.integers(0, 99),
        trained=often,
    )
    def inject(self, name, where, r, alpha, rslora, seed, trained) -> None:
        self.add(name, where, r, alpha, rslora, seed, trained)

    def add(self, name, where, r, alpha, rslora, seed, trained) -> None:
        before = self.model(self.x)

        def call() -> None:
            lora.inject(
                self.model, r=r, alpha=alpha, targets=where, rslora=rslora, adapter=name, seed=seed
            )

        allowed = self.settled and name not in self.bank
        if not self.attempt(call, allowed=allowed, error=(ValueError, RuntimeError)):
            return
        if not self.active:
            assert raw(self.model(self.x)) == raw(before)
        self.active = {name: 1.0}
        scaling = alpha / (math.sqrt(r) if rslora else r)
        shares = {p: Share(rows, [], [], scaling) for p, rows in TARGETS[where].items()}
        self.bank[name] = shares
        if trained:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for path in shares:
                    for p in getattr(self.model, path).updates[name].parameters():
                        p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
        self.record(name)

    def record(self, name: str) -> None:
        """Write down an adapter's factors as they stand now."""
        for path, share in self.bank[name].items():
            update = getattr(self.model, path).updates[name]
            k, (start, stop) = len(share.rows), share.rows[0]
            share.a = [a.clone() for a in update.A.detach().chunk(k)]
            share.b = [b.clone() for b in update.B.detach().split(stop - start)]
            assert len(share.a) == len(share.b) == k

    @precondition(lambda self: self.bank)
    @rule(data=st.data())
    def activate(self, data) -> None:
        mixture = self.mixture(data)
        known = self.weights(mixture).keys() <= self.bank.keys()
        allowed = self.settled and known
        if self.attempt(
            lambda: lora.activate(self.model, mixture),
            allowed=allowed,
            error=(ValueError, RuntimeError),
        ):
            self.active = self.weights(mixture)

    @precondition(lambda self: self.bank)
    @rule(data=st.data(), merge=st.booleans(), fail=st.booleans())
    def activated(self, data, merge, fail) -> None:
        mixture = self.mixture(data)
        known = self.weights(mixture).keys() <= self.bank.keys()
        before = snapshot(self.model)
        try:
            with lora.activated(self.model, mixture), ExitStack() as body:
                if merge:
                    body.enter_context(lora.merged(self.model))
                self.agrees(self.model(self.x), self.x, self.weights(mixture))
                if fail:
                    raise KeyError
        except KeyError:
            assert fail
        except (ValueError, RuntimeError):
            assert not (self.settled and known)
        else:
            assert self.settled
            assert known
        assert snapshot(self.model) == before

    @precondition(lambda self: self.bank and self.rows is None)
    @rule(data=st.data())
    def enter_routed(self, data) -> None:
        rows = [self.mixture(data) if data.draw(often) else None for _ in range(ROWS)]
        known = all(self.weights(row).keys() <= self.bank.keys() for row in rows)
        if self.attempt(
            lambda: self.route.enter_context(lora.routed(self.model, rows)),
            allowed=known and not self.merged,
            error=(ValueError, RuntimeError),
        ):
            self.rows = rows

    @precondition(lambda self: self.rows is not None)
    @rule(fail=st.booleans())
    def leave_routed(self, fail) -> None:
        self.route.__exit__(*((KeyError, KeyError(), None) if fail else (None, None, None)))
        self.route, self.rows = ExitStack(), None

    @rule()
    def merge(self) -> None:
        if self.attempt(lambda: lora.merge(self.model), allowed=bool(self.bank) and self.settled):
            self.merged = True

    @rule()
    def unmerge(self) -> None:
        if self.attempt(lambda: lora.unmerge(self.model), allowed=self.merged):
            self.merged = False

    @precondition(lambda self: not self.settled)
    @rule()
    def settle(self) -> None:
        """Most operations are refused while merged or routed: do not linger there."""
        if self.merged:
            self.unmerge()
        else:
            self.leave_routed(fail=False)

    @precondition(lambda self: self.bank)
    @rule(name=names)
    def save(self, name) -> None:
        if self.attempt(
            lambda: lora.save(self.model, self.folder / name, adapter=name),
            allowed=name in self.bank,
            error=ValueError,
        ):
            self.saved[name] = copy.deepcopy(self.bank[name])

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), name=names)
    def load(self, data, name) -> None:
        saved = data.draw(st.sampled_from(sorted(self.saved)))
        if self.attempt(
            lambda: lora.load(self.model, self.folder / saved, adapter=name),
            allowed=self.settled and name not in self.bank,
            error=(ValueError, RuntimeError),
        ):
            self.bank[name] = copy.deepcopy(self.saved[saved])
            self.active = {name: 1.0}
            for path, share in self.bank[name].items():  # a sliced adapter is sliced again
                parts = getattr(self.model, path).updates[name]
                assert parts.B.numel() == sum(b.numel() for b in share.b)

    @precondition(lambda self: self.bank)
    @rule(name=names)
    def remove(self, name) -> None:
        if self.attempt(
            lambda: lora.remove(self.model, name),
            allowed=self.settled and name in self.bank,
            error=(ValueError, RuntimeError),
        ):
            del self.bank[name]
            self.active.pop(name, None)
            self.unchanged_if_empty()

    @rule()
    def eject(self) -> None:
        if self.attempt(lambda: lora.eject(self.model), allowed=bool(self.bank) and self.settled):
            self.bank, self.active = {}, {}
            self.unchanged_if_empty()

    def unchanged_if_empty(self) -> None:
        if not self.bank:
            assert snapshot(self.model) == self.born  # object for object

    @precondition(lambda self: self.bank and self.rows is None)
    @rule()
    def eject_a_copy_for_good(self) -> None:
        other = copy.deepcopy(self.model)
        if not self.merged:
            lora.merge(other)
        want = raw(other(self.x))
        lora.eject(other, merge=True)
        assert raw(other(self.x)) == want
        assert {n for n, p in other.named_parameters() if p.requires_grad} == self.thawed

    @precondition(lambda self: self.bank and not self.merged)
    @rule(lr=st.sampled_from([0.01, 0.1]))
    def train(self, lr) -> None:
        for p in (trained := lora.trainable_parameters(self.model)):
            p.grad = None
        loss = self.model(self.x).float().square().mean()
        if loss.requires_grad:  # under routing, where a row is under what is trained
            loss.backward()
        with torch.no_grad():
            for p in trained:
                if p.grad is not None:
                    p.sub_(lr * p.grad.clamp(-1, 1))
                    p.grad = None
        for name in self.bank:
            self.record(name)

    @precondition(lambda self: self.bank)
    @rule(how=st.sampled_from(["nan", "inf"]), factor=st.sampled_from("AB"), data=st.data())
    def a_broken_factor_stops_merge_and_save(self, how, factor, data) -> None:
        name = data.draw(st.sampled_from(sorted(self.bank)))
        path = data.draw(st.sampled_from(sorted(self.bank[name])))
        tensor = getattr(getattr(self.model, path).updates[name], factor)
        good = tensor.detach().clone()
        with torch.no_grad():
            tensor[0, 0] = float(how)
        self.attempt(
            lambda: lora.save(self.model, self.folder / "broken", adapter=name),
            allowed=False,
            error=ValueError,
        )
        assert not (self.folder / "broken").exists()
        if self.active.get(name):
            self.attempt(
                lambda: lora.merge(self.model), allowed=False, error=(ValueError, RuntimeError)
            )
        with torch.no_grad():
            tensor.copy_(good)

    @rule(
        call=st.sampled_from(
            [
                lambda m: lora.inject(m, r=99, targets="first", adapter="new"),
                lambda m: lora.inject(m, r=1, targets=("first", "frist"), adapter="new"),
                lambda m: lora.inject(m, r=1, targets="wide[x]", adapter="new"),
                lambda m: lora.inject(m, r=1, targets="first", adapter="a.b"),
                lambda m: lora.activate(m, "nobody"),
                lambda m: lora.activate(m, {"legal": float("nan")}),
                lambda m: lora.remove(m, "nobody"),
                lambda m: lora.load(m, "/nowhere"),
                lambda m: lora.algebra.implant(
                    m, {"first": lora.algebra.Factors(torch.ones(1, 9), torch.ones(6, 1))}
                ),
                lambda m: lora.routed(m, []).__enter__(),
                lambda m: lora.routed(m, ["nobody"]).__enter__(),
            ]
        )
    )
    def failing(self, call) -> None:
        errors = (ValueError, RuntimeError, FileNotFoundError)
        self.attempt(lambda: call(self.model), allowed=False, error=errors)

    @precondition(lambda self: self.bank)
    @rule(context=st.sampled_from([lora.disabled, lora.merged]))
    def exceptions_inside_contexts(self, context) -> None:
        before = snapshot(self.model)
        error = RuntimeError if context is lora.merged and self.rows is not None else KeyError
        with pytest.raises(error), context(self.model):
            self.model(self.x)
            raise KeyError
        assert snapshot(self.model) == before


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=int(os.environ.get("STATE_MACHINE_EXAMPLES", "25")),
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
