"""Nothing wrong in silence: births, derivatives, forwards of a layer's own, odd tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import gpt2
import lora
from lora.fast import forms
from tests.toys import IDX, layer, randomize, raw, snapshot, tiny_gpt2


def one(base: nn.Module, *, drawn: bool = True, **settings) -> nn.Sequential:
    model = nn.Sequential(base)
    lora.inject(model, **{"targets": "0", "r": 2, "seed": 0, **settings})
    if drawn:
        randomize(model)
    return model


# At birth nothing changes


def make_negative_zeros(base: nn.Module) -> None:
    """Let every output of the base be -0.0, to which adding 0.0 would show."""
    base.register_forward_hook(lambda module, inputs, y: -(y.abs() * 0))


def refused(call) -> bool:
    """Whether the call refuses its alpha."""
    try:
        call()
    except ValueError as error:
        return "scaling" in str(error)
    return False


@given(
    kind=st.sampled_from(["linear", "conv1d"]),
    n_in=st.integers(1, 9),
    n_out=st.integers(1, 9),
    rows=st.integers(0, 5),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    alpha=st.sampled_from([1e-30, 1.0, 16.0, 1e6, 1e30, 3e38, 1e39]),
    zeros=st.booleans(),
    fused=st.booleans(),
    r=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_a_new_adapter_changes_no_bit_of_the_outputs(
    kind, n_in, n_out, rows, dtype, alpha, zeros, fused, r, seed
):
    torch.manual_seed(seed)
    base = layer(kind, n_in, n_out, dtype)
    x = torch.randn(rows, n_in).to(dtype)
    if zeros:
        make_negative_zeros(base)
    want = base(x)
    model = nn.Sequential(base)
    before = snapshot(model)
    if refused(lambda: lora.inject(model, targets="0", r=min(r, n_in, n_out), alpha=alpha)):
        assert snapshot(model) == before
        return
    model[0].fused = fused
    assert torch.equal(model(x), want)
    with torch.no_grad():
        assert torch.equal(model(x), want)
    model.eval()
    with torch.inference_mode():
        assert torch.equal(model(x), want)
    lora.merge(model)
    with torch.no_grad():
        merged = model(x)
    assert torch.equal(merged, want)  # W + 0 = W


@pytest.mark.parametrize(
    ("dtype", "alpha"), [(torch.float32, 1e39), (torch.float16, 1e6), (torch.float32, 2e38)]
)
@pytest.mark.parametrize("routed", [False, True])
def test_a_huge_alpha_is_refused_or_finite_at_birth(dtype, alpha, routed):
    model = nn.Sequential(nn.Linear(4, 4)).to(dtype)
    x = torch.randn(3, 4).to(dtype)
    want = raw(model(x))
    before = snapshot(model)
    if refused(lambda: lora.inject(model, targets="0", r=1, alpha=alpha, dtype=dtype)):
        assert snapshot(model) == before
        return
    if routed:
        with lora.routed(model, ["default", None, "default"]):
            assert raw(model(x)) == want
    assert raw(model(x)) == want


def test_routed_rows_change_no_bit_at_birth():
    base = nn.Linear(4, 5)
    make_negative_zeros(base)
    model, x = one(base, drawn=False), torch.rand(3, 4)
    want = base(x)
    assert torch.signbit(base(x)).all()
    with lora.routed(model, ["default", None, "default"]):
        assert torch.equal(model(x), want)


# Derivatives


def with_factors(model: nn.Module, names: tuple[str, ...], seed: int | None):
    """The model as a function of x and of the factors; dropout drops the same each time."""
    keys = [f"0.updates.{name}.{factor}" for name in names for factor in "AB"]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        found = dict(zip(keys, values, strict=True))
        return torch.func.functional_call(model, found, (x,)).pow(3)

    parameters = dict(model.named_parameters())
    return call, [parameters[key] for key in keys]


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("form", ["readable", "add", "mixture", "sliced", "conv1d"])
def test_second_derivatives_are_right(form, p):
    torch.manual_seed(0)
    base = layer("conv1d" if form == "conv1d" else "linear", 4, 6, torch.double)
    targets, slices = ("0[q,v]", ("q", "k", "v")) if form == "sliced" else ("0", None)
    model = one(base, dropout=p, targets=targets, slices=slices)
    model[0].fused = form != "readable"
    names: tuple[str, ...] = ("default",)
    if form == "mixture":
        lora.inject(model, targets="0", r=1, adapter="other", dropout=p)
        randomize(model, "other")
        names = ("default", "other")
        lora.activate(model, {"default": 0.7, "other": -0.5})
    call, factors = with_factors(model, names, seed=1)
    x = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *factors))
    assert torch.autograd.gradgradcheck(call, (x, *factors))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_second_derivatives_of_the_wide_form_are_right(kind, p):
    torch.manual_seed(0)
    base = layer(kind, 4, 6, torch.double)
    weight = base.weight.detach() if kind == "linear" else base.weight.detach().t()
    a, b = torch.randn(2, 4).double(), torch.randn(6, 2).double()

    def call(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(1)
        return forms.wide_linear(x, weight, base.bias.detach(), forms.Term(a, b, 0.7, p)).pow(3)

    values = [torch.randn(3, 4).double(), a, b]
    values = [value.requires_grad_() for value in values]
    assert torch.autograd.gradcheck(call, values)
    assert torch.autograd.gradgradcheck(call, values)


def test_transforms_of_torch_func_give_autograds_gradients():
    model = one(nn.Linear(4, 6).double())
    call, (a, b) = with_factors(model, ("default",), None)
    x = torch.randn(3, 4).double()

    def loss(a: Tensor) -> Tensor:
        return call(x, a, b).sum()

    (want,) = torch.autograd.grad(loss(a), a)
    torch.testing.assert_close(torch.func.grad(loss)(a), want)
    stacked = torch.stack([a, 2 * a]).detach()
    twice = (2 * a).detach().requires_grad_()
    each = torch.stack([want, *torch.autograd.grad(loss(twice), twice)])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(stacked), each)
    direction = torch.randn_like(a)
    _, slope = torch.func.jvp(loss, (a,), (direction,))
    torch.testing.assert_close(slope, (want * direction).sum())
    hessian = torch.func.hessian(loss)(a)
    second = torch.autograd.functional.hessian(loss, a)
    torch.testing.assert_close(hessian, second)


def test_forward_mode_outside_of_torch_func_is_right_or_loud():
    model = one(nn.Linear(4, 6).double())
    x, direction = torch.randn(2, 3, 4).double()
    model[0].fused = False
    _, want = torch.func.jvp(model, (x,), (direction,))
    model[0].fused = True
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        try:
            slope = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
        except (RuntimeError, NotImplementedError):
            return
    assert slope is not None
    torch.testing.assert_close(slope, want)


# Layers with a forward of their own


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Halved(gpt2.Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Shifted(gpt2.Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Normed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.normalize(x, dim=-1))


class Conv1D(nn.Linear):
    """Called so, but a Linear."""


OWN = {
    "embedding": (lambda: Scaled(9, 4), lambda x, w, b: 3 * F.embedding(x, w)),
    "linear": (lambda: Doubled(4, 6), lambda x, w, b: 2 * F.linear(x, w, b)),
    "conv1d": (lambda: Halved(4, 6), lambda x, w, b: (x @ w + b) / 2),
    "named Conv1D": (lambda: Conv1D(4, 4), lambda x, w, b: F.linear(x, w, b)),
}


@pytest.mark.parametrize("kind", OWN)
def test_a_layers_own_forward_runs_on_the_weight_in_force(kind):
    torch.manual_seed(0)
    make, formula = OWN[kind]
    base = make().double()
    ids = isinstance(base, nn.Embedding)
    x = torch.tensor([[1, 2, 3]]) if ids else torch.randn(2, 3, 4).double()
    model = one(base, drawn=False)
    assert torch.equal(model(x), base(x))
    randomize(model)
    update = model[0].updates["default"]
    bias = getattr(base, "bias", None)
    a, b = (p.detach().clone().requires_grad_() for p in (update.A, update.B))
    delta = update.config.scaling * b @ a
    turned = ids or isinstance(base, gpt2.Conv1D)
    want = formula(x, base.weight + (delta.t() if turned else delta), bias)
    torch.testing.assert_close(model(x), want)
    model(x).square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(update.A.grad, a.grad)
    torch.testing.assert_close(update.B.grad, b.grad)
    with lora.merged(model):
        torch.testing.assert_close(model(x), want)
    with lora.disabled(model):
        assert torch.equal(model(x), base(x))
    lora.eject(model, merge=True)
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("kind", [Shifted, Normed])
def test_a_forward_that_is_no_multiple_of_its_formula_is_refused_at_inject(kind):
    model = nn.Sequential(kind(4, 6), nn.Linear(6, 4))
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"0: \w+\.forward is no multiple of its formula .exclude="
    ):
        lora.inject(model, r=2, targets=("0", "1"))
    assert snapshot(model) == before
    assert lora.inject(model, r=2, targets=("0", "1"), exclude="0") == ["1"]


def test_beside_a_forward_that_was_set_on_one_layer_the_update_is_added():
    base = nn.Linear(4, 6)
    base.forward = lambda x: 5 * F.linear(x, base.weight, base.bias)
    x = torch.randn(3, 4)
    model = one(base)
    update = model[0].updates["default"]
    want = base(x) + x @ update.delta().float().t()
    torch.testing.assert_close(model(x), want)
    with lora.disabled(model):
        assert torch.equal(model(x), base(x))
    with pytest.raises(ValueError, match="0 cannot be merged: a hook moves its weight"):
        lora.merge(model)


def test_a_base_compiled_in_its_place_is_merged_too():
    base = nn.Linear(4, 6)
    base.compile(backend="eager")
    model = one(base)
    x = torch.randn(3, 4)
    with torch.no_grad():
        want = model(x)
        with lora.merged(model):
            torch.testing.assert_close(model(x), want)


def test_dropout_and_routing_beside_a_layer_with_a_forward_of_its_own():
    model, x = one(Doubled(4, 6), dropout=0.5), torch.randn(2, 4)
    torch.manual_seed(3)
    got = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(got, model[0].base(x) + 2 * model[0].updates["default"](x))
    model.eval()
    with lora.routed(model, ["default", None]):
        torch.testing.assert_close(model(x)[1], model[0].base(x)[1])
        rows = model(x)
    torch.testing.assert_close(rows[0], model(x)[0])


@pytest.mark.parametrize("state", ["unmerged", "merged", "disabled", "routed"])
@pytest.mark.parametrize("base", [nn.Linear(4, 6), Doubled(4, 6)], ids=["plain", "own"])
def test_hooks_of_the_base_run_once_a_call(base, state):
    model = one(base)
    calls: list[str] = []
    handles = [
        base.register_forward_pre_hook(lambda *_: calls.append("before")),
        base.register_forward_hook(lambda m, i, y: (calls.append("after"), y + 1)[1]),
    ]
    if state == "merged":
        lora.merge(model)
    contexts = {"disabled": lora.disabled, "routed": lambda m: lora.routed(m, ["default"] * 3)}
    with contexts.get(state, lambda m: torch.enable_grad())(model):
        y = model(torch.randn(3, 4))
        y.sum().backward() if y.requires_grad else None
    assert calls == ["before", "after"]
    for handle in handles:
        handle.remove()


# Tensors in odd states


@pytest.mark.parametrize("fused", [True, False])
def test_an_output_may_be_changed_in_place(fused):
    torch.manual_seed(0)
    grads = []
    for inplace in (True, False):
        model = one(nn.Linear(4, 5))
        with torch.no_grad():
            model[0].base.weight.fill_(0.1)
            model[0].base.bias.fill_(0.1)
        model[0].fused = fused
        torch.manual_seed(1)
        torch.relu_(y) if inplace and (y := model(torch.randn(3, 4))) is not None else None
        y = y if inplace else torch.relu(model(torch.randn(3, 4)))
        y.sum().backward()
        grads.append([p.grad for p in model[0].updates.parameters()])
    for with_it, without in zip(*grads, strict=True):
        torch.testing.assert_close(with_it, without)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (4,)])
def test_a_batch_of_any_shape_goes_back_and_forth(kind, fused, p, shape):
    model = one(layer(kind, 4, 5), dropout=p)
    model[0].fused = fused
    x = torch.randn(*shape, requires_grad=True)
    y = model(x)
    assert y.shape == (*shape[:-1], 5)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(torch.isfinite(q.grad).all() for q in model[0].updates.parameters())


def test_the_default_dtype_of_torch_changes_nothing():
    def run(default: torch.dtype) -> list[bytes]:
        model = tiny_gpt2()
        try:
            torch.set_default_dtype(default)
            lora.inject(model, r=2, seed=0, targets="all-linear")
            assert {p.dtype for p in model.parameters()} == {torch.float32}
            torch.set_default_dtype(torch.float32)
            randomize(model)
            torch.set_default_dtype(default)
            model(IDX).square().mean().backward()
            outcome = [raw(p.grad) for p in lora.trainable_parameters(model)]
            with lora.merged(model):
                outcome.append(raw(model(IDX)))
            with lora.routed(model, ["default", None]):
                return [*outcome, raw(model(IDX))]
        finally:
            torch.set_default_dtype(torch.float32)

    assert run(torch.float64) == run(torch.float32)


def test_the_default_device_of_torch_is_not_where_an_adapter_goes():
    model = tiny_gpt2()
    lora.inject(model, r=2, seed=0, targets="all-linear", dropout=0.1)
    want = raw(next(p for n, p in model.named_parameters() if n.endswith(".A")))
    again = tiny_gpt2()
    try:
        torch.set_default_device("meta")
        lora.inject(again, r=2, seed=0, targets="all-linear", dropout=0.1)
        again.train()(IDX).sum().backward()
        again.eval()
        lora.merge(again)
        lora.unmerge(again)
        with lora.routed(again, ["default", None]):
            again(IDX).sum().backward()
        value = lora.algebra.factors(again)
        lora.algebra.dare([value], 0.5, seed=0)
        lora.algebra.ties([value], 0.5)
        small = lora.algebra.compress(value, 1).adapter
        lora.algebra.implant(again, small, "small")
    finally:
        torch.set_default_device(None)
    assert raw(next(p for n, p in again.named_parameters() if n.endswith(".default.A"))) == want


def test_merging_under_autocast_gives_the_same_bytes():
    plain, cast = tiny_gpt2(), tiny_gpt2()
    for model in (plain, cast):
        lora.inject(model, r=2, targets="all-linear", seed=0)
        randomize(model)
    report = lora.merge(plain)
    with torch.autocast("cpu", torch.bfloat16):
        under = lora.merge(cast)
    assert under == report
    merged = [m.merged.weight for m in plain.modules() if isinstance(m, lora.LoRALinear)]
    again = [m.merged.weight for m in cast.modules() if isinstance(m, lora.LoRALinear)]
    assert [raw(w) for w in again] == [raw(w) for w in merged]
    lora.unmerge(cast)
    with torch.autocast("cpu", torch.bfloat16), lora.merged(cast):
        assert [raw(m.merged.weight) for m in cast.modules() if isinstance(m, lora.LoRALinear)] == [
            raw(w) for w in merged
        ]
