"""Rows of one batch under different adapters: each row as if it were alone."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gpt2
import lora
from tests.toys import TINY, adapted, layer, randomize, refused, snapshot, tiny_gpt2, twin, untie

IDX = torch.randint(0, TINY.vocab_size, (5, 7), generator=torch.Generator().manual_seed(0))
ROWS = ["a", None, {"b": 0.5, "c": -2.0}, "c", "b"]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def bank(dtype: torch.dtype = torch.float64) -> gpt2.GPT2:
    """Adapters of three ranks, one rsLoRA, one on slices, on targets that differ."""
    model = tiny_gpt2(dtype=dtype)
    untie(model.transformer.wte)
    lora.inject(model, r=2, alpha=3, targets=("c_attn", "wte"), adapter="a")
    lora.inject(model, r=4, alpha=2, rslora=True, targets="all-linear", adapter="b")
    lora.inject(model, r=3, targets=("c_attn[q,v]", "wte"), adapter="c")
    for seed, name in enumerate("abc"):
        randomize(model, name, seed=seed, std=0.2)
    lora.activate(model, dict.fromkeys("abc", 1.0))  # all are trained
    return model


def alone(model: nn.Module, row: int, x: torch.Tensor) -> torch.Tensor:
    with lora.activated(model, ROWS[row] or {}):
        return model(x[row : row + 1])


def test_each_row_equals_what_it_gives_alone():
    model = bank()
    want = torch.cat([alone(model, row, IDX) for row in range(5)])
    before = snapshot(model)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), lora.routed(model, ROWS):
            torch.testing.assert_close(model(IDX), want, **EXACT)
    assert snapshot(model) == before
    torch.testing.assert_close(alone(model, 1, IDX), tiny_gpt2(dtype=torch.float64)(IDX[1:2]))


def test_gradients_are_the_sums_over_the_rows():
    model, other = bank(), bank()
    with lora.routed(model, ROWS):
        model(IDX).square().sum().backward()
    for row in range(5):
        with lora.activated(other, ROWS[row] or {}):
            if ROWS[row] is not None:
                other(IDX[row : row + 1]).square().sum().backward()
    got = {n: p.grad for n, p in model.named_parameters()}
    want = {n: p.grad for n, p in other.named_parameters()}
    assert {n for n, g in got.items() if g is not None} == {n for n in got if ".updates." in n}
    for name, grad in want.items():
        if grad is not None:
            torch.testing.assert_close(got[name], grad, rtol=1e-9, atol=1e-9)


def test_training_rows_under_an_adapter_that_is_not_trained_is_refused():
    model = bank()
    lora.activate(model.train(), "a")
    with refused(model, "To train a, b together, lora.activate them all", RuntimeError):
        lora.routed(model, ["a", "b"]).__enter__()
    with torch.no_grad(), lora.routed(model, ["a", "b"]):
        model(IDX[:2])


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("middle", [(), (3,), (2, 3), (0,)])
def test_inputs_of_any_number_of_axes(kind, middle):
    torch.manual_seed(0)
    model = nn.Sequential(layer(kind, 6, 4, torch.float64))
    for name, r in (("a", 1), ("b", 3)):
        adapted(model, r=r, targets="0", adapter=name, values=r)
    lora.activate(model, {"a": 1.0, "b": 1.0})
    x = torch.randn(3, *middle, 6, dtype=torch.float64)
    rows = ["b", {"a": 2.0, "b": 1.0}, None]
    with lora.routed(model, rows):
        y = model(x)
    for row, mixture in enumerate(rows):
        with lora.activated(model, mixture or {}):
            torch.testing.assert_close(y[row], model(x[row]), **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_stay_16_bits(dtype):
    model, exact = bank(dtype), bank()
    with torch.no_grad(), lora.routed(model, ROWS), lora.routed(exact, ROWS):
        y, want = model(IDX), exact(IDX)
    assert y.dtype == dtype
    assert (y.double() - want).norm() < 16 * torch.finfo(dtype).eps * want.norm()


def test_a_batch_of_another_size_is_an_error():
    model = bank()
    with lora.routed(model, ["a", "b"]):
        for x in (IDX[:1], IDX[:3]):
            with pytest.raises(ValueError, match=f"has {len(x)} rows, but 2 are routed"):
                model(x)


@pytest.mark.parametrize("rows", [[], None, "abc", (), {"a": 1.0}, ["nobody"], [["a"]]])
def test_rows_that_are_refused(rows):
    model = bank()
    with refused(model, "rows must|no adapter|Give a name"):
        lora.routed(model, rows).__enter__()
    with refused(model, "no adapter 'one', 'two' here"):
        lora.routed(model, ["one", {"a": 1.0, "two": 0.5}, "one"]).__enter__()


def test_contexts_nest_and_survive_exceptions():
    model = bank()
    with torch.no_grad():
        want = [alone(model, row, IDX) for row in (0, 3)]
        with lora.routed(model, ["a"]):
            before = snapshot(model)
            with pytest.raises(KeyError), lora.routed(model, ["c"]):
                torch.testing.assert_close(model(IDX[3:4]), want[1], **EXACT)
                raise KeyError
            assert snapshot(model) == before
            torch.testing.assert_close(model(IDX[:1]), want[0], **EXACT)
            with lora.disabled(model):
                base = tiny_gpt2(dtype=torch.float64)(IDX)
                torch.testing.assert_close(model(IDX), base, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="is merged"), lora.merged(model):
        lora.routed(model, ["a"]).__enter__()


@pytest.mark.parametrize("where", ["A", "B"])
def test_a_factor_changed_inside_the_context_is_followed(where):
    model, other = bank(), bank()
    with lora.routed(model, ["a", None]), lora.routed(other, ["a", None]), torch.no_grad():
        before = model(IDX[:2])
        for m in (model, other):
            factor = getattr(m.transformer.h[1].attn.c_attn.updates["a"], where)
            factor.data = factor * 1.5  # which no version counter tells
        after = model(IDX[:2])
        torch.testing.assert_close(after, other(IDX[:2]), **EXACT)
        assert not torch.equal(before[0], after[0])
        assert torch.equal(before[1], after[1])


def test_entered_without_gradients_it_keeps_the_factors_of_that_moment_until_one_trains():
    model = bank()
    factor = model.transformer.h[1].attn.c_attn.updates["a"].A
    with torch.no_grad(), lora.routed(model, ["a", None]):
        before = model(IDX[:2])
        factor.mul_(1.5)
        assert torch.equal(model(IDX[:2]), before)
        with torch.enable_grad():
            after = model(IDX[:2])
        assert not torch.equal(after[0], before[0])
        assert torch.equal(model(IDX[:2]), after)
    with torch.no_grad(), lora.routed(model, ["a", None]):
        assert torch.equal(model(IDX[:2]), after)


def test_inference_mode_throughout():
    with torch.inference_mode():
        model = bank()
        want = torch.cat([alone(model, row, IDX) for row in range(5)])
        with lora.routed(model, ROWS):
            torch.testing.assert_close(model(IDX), want, **EXACT)
        model.transformer.h[0].attn.c_attn.updates["a"].A.zero_()
        with lora.routed(model, ROWS):
            assert not torch.allclose(model(IDX), want)


def test_dropout_is_that_of_the_adapters_named():
    model = nn.Sequential(layer("conv1d", 6, 6))
    for name, p in (("a", 0.0), ("b", 0.5), ("c", 0.5)):
        adapted(model, targets="0", dropout=p, adapter=name)
    lora.activate(model, dict.fromkeys("abc", 1.0))
    x = torch.randn(2, 9, 6)
    model.train()
    with pytest.raises(RuntimeError, match="same dropout"):
        lora.routed(model, ["a", "b"]).__enter__()
    with lora.routed(model, ["a", None]):  # b's and c's dropout is none of its business
        assert torch.equal(model(x), model(x))
    with lora.routed(model, ["c", "b"]):
        assert not torch.equal(model(x), model(x))
    with lora.routed(model, ["c", "b"]):
        model.eval()
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))
    with lora.routed(model.eval(), ["a", "b"]):
        assert torch.equal(model(x), model(x))


class Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += 1
        return func(*args, **(kwargs or {}))


def test_the_number_of_operations_does_not_grow_with_the_number_of_adapters():
    def operations(n: int) -> int:
        model = tiny_gpt2()
        for i in range(n):
            lora.inject(model, r=1 + i % 3, adapter=f"task{i}")
        with torch.no_grad(), lora.routed(model, [f"task{i % n}" for i in range(8)]):
            x = IDX[:1].expand(8, -1)
            model(x)
            with Counter() as counter:
                model(x)
        return counter.ops

    assert operations(1) == operations(8)


def test_one_batch_of_prompts_under_many_tasks_generates_what_each_gives():
    model = tiny_gpt2()
    for name, targets in (("a", "c_attn"), ("b", "all-linear"), ("c", "c_attn[q,v]")):
        lora.inject(model, r=len(targets) % 4 + 1, targets=targets, adapter=name)
        randomize(model, name, seed=ord(name), std=0.5)
    prompts = [[5, 6, 7], [9], [1, 2, 3, 4, 5], [9], [30, 31]]
    config = gpt2.GenerateConfig(max_new_tokens=6, eos=None)
    want = []
    for prompt, row in zip(prompts, ROWS, strict=True):
        with lora.activated(model, row or {}):
            want += gpt2.generate(model, [prompt], config)
    with lora.routed(model, ROWS):
        assert gpt2.generate(model, prompts, config) == want
    assert len({tuple(tokens) for tokens in want}) > 3  # the tasks do differ


def test_peft_gives_the_same_in_a_mixed_batch(tmp_path):
    ours = tiny_gpt2()
    for name, r in (("a", 2), ("b", 5)):
        adapted(ours, r=r, targets=("c_attn", "c_fc"), adapter=name, values=r)
        lora.save(ours, tmp_path / name, adapter=name)
    theirs = peft.PeftModel.from_pretrained(twin(tiny_gpt2()), tmp_path / "a", "a")
    theirs.load_adapter(tmp_path / "b", "b")
    theirs.eval()
    rows = ["b", "__base__", "a", "a", "b"]
    with torch.no_grad(), lora.routed(ours, [None if r == "__base__" else r for r in rows]):
        want = theirs(IDX, adapter_names=rows).logits
        torch.testing.assert_close(ours(IDX), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_without_recompiling_when_the_routing_changes(grad):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(layer("conv1d", 6, 6), nn.Tanh(), layer("linear", 6, 4)).eval()
    for name, r in (("a", 1), ("b", 3)):
        adapted(model, r=r, targets=("0", "2"), adapter=name, values=r)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 2, 6)
    mixed = {"a": 0.5, "b": 0.5}
    routings = [["a", "b", None], ["b", "b", "a"], [None, "a", "b"]]
    if not grad:  # in training a change of which adapters are trained at all is another graph
        routings += [["b", "b", "b"], ["a", None, "a"]]
    mixtures = [["a", mixed, None], [mixed, "b", mixed]]
    with torch.set_grad_enabled(grad):
        for group in (routings, mixtures):
            for i, rows in enumerate(group):
                with lora.routed(model, rows), torch._dynamo.config.patch(error_on_recompile=i > 0):
                    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
                    if i:  # in place, behind the compiler's back
                        with torch.no_grad():
                            model[0].updates["b"].A.mul_(1.1)
                        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_a_copy_made_inside_the_contexts_is_outside_of_them():
    model = bank()
    want = model(IDX)
    with lora.routed(model, ROWS), lora.disabled(model):
        other = copy.deepcopy(model)
    assert torch.equal(other(IDX), want)
    lora.eject(other)
    assert not any(isinstance(module, lora.LoRALinear) for module in other.modules())
