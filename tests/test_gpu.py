"""What only a GPU does: wide products, CUDA graphs and compiled steps against the readable path."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import gpt2
import lora
from gpt2.data.batches import Batch
from gpt2.training.step import Stepper
from lora.fast import forms
from tests.toys import randomize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CONFIG = gpt2.GPT2Config(n_layer=2, n_head=2, n_embd=128, block_size=1024, vocab_size=1001)
DRY = replace(CONFIG, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
ALL = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
HOW = {
    "eager": {"cuda_graph": False},
    "graph": {"cuda_graph": True},
    "compiled": {"compile": True, "cuda_graph": False},
    "compiled graph": {"compile": True},
    "checkpointing": {"checkpointing": True},
    "compiled checkpointing": {"compile": True, "checkpointing": True},
}


def build(
    config: gpt2.GPT2Config, dtype: torch.dtype, dropout: float = 0.0, fused: bool = True
) -> gpt2.GPT2:
    torch.manual_seed(0)
    model = gpt2.GPT2(config).to("cuda", dtype).eval()
    lora.inject(model, r=8, alpha=16, dropout=dropout, targets=ALL, seed=0)
    randomize(model.cpu(), std=0.05)
    for module in model.modules():
        if isinstance(module, lora.LoRALinear):
            module.fused = fused
    return model.cuda()


def batch(B: int = 4, T: int = 640) -> Batch:  # enough rows for the wide product
    idx = torch.randint(CONFIG.vocab_size, (B, T), generator=torch.Generator().manual_seed(0))
    return Batch(idx, idx.clone(), B * (T - 1)).to(torch.device("cuda"))


def trained(model: gpt2.GPT2, steps: int = 3, **how) -> tuple[list[list[float]], torch.Tensor]:
    """Losses and gradient norms of a few steps, and all factors after them."""
    model.train()
    stepper = Stepper(model, gpt2.TrainConfig(steps=steps, lr=1e-3, **how))
    figures = [stepper([batch()], step).tolist() for step in range(1, steps + 1)]
    return figures, torch.cat([p.detach().flatten() for p in lora.trainable_parameters(model)])


@pytest.mark.parametrize("how", HOW)
def test_every_way_to_step_gives_the_readable_steps_in_float32(how):
    want, factors = trained(build(DRY, torch.float32, fused=False), cuda_graph=False)
    got, others = trained(build(DRY, torch.float32), **HOW[how])
    for figures, wanted in zip(got, want, strict=True):
        assert figures == pytest.approx(wanted, rel=2e-5)
    assert (others - factors).norm() < 2e-4 * factors.norm()


@pytest.mark.parametrize("how", HOW)
def test_every_way_to_step_is_as_near_to_float32_in_bfloat16(how):
    truth, _ = trained(build(DRY, torch.float32, fused=False), cuda_graph=False)
    readable, _ = trained(build(DRY, torch.bfloat16, fused=False), cuda_graph=False)
    got, _ = trained(build(DRY, torch.bfloat16), **HOW[how])
    for mine, other, wanted in zip(got, readable, truth, strict=True):
        assert mine == pytest.approx(wanted, rel=1e-2)
        assert other == pytest.approx(wanted, rel=1e-2)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_wide_product_is_the_readable_sum(dropout):
    layer = build(DRY, torch.float32, dropout).transformer.h[0].attn.c_attn.train()
    x = torch.randn(4096, 128, device="cuda", requires_grad=True)
    update = layer.updates["default"]
    assert forms.pays_wide(x, update.config.r)
    results = []
    for layer.fused in (True, False):
        torch.cuda.manual_seed(5)
        y = layer(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, update.A, update.B))))
    for wide, readable in zip(*results, strict=True):
        assert (wide - readable).norm() < 3e-6 * readable.norm()


@pytest.mark.parametrize("how", HOW)
def test_dropout_is_drawn_anew_in_each_step_and_a_seed_fixes_it(how):
    runs = []
    for _ in range(2):
        model = build(CONFIG, torch.float32, 0.5).train()
        stepper = Stepper(model, gpt2.TrainConfig(steps=3, **HOW[how]))
        runs.append([stepper([batch()], step, 0.0).tolist() for step in (1, 2, 3)])
    assert len({loss for loss, *_ in runs[0]}) == 3
    assert [x for x, *_ in runs[1]] == pytest.approx([x for x, *_ in runs[0]], rel=1e-6)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"temperature": 0.8, "repetition_penalty": 1.3},
        {"num_beams": 5, "length_penalty": 0.8, "no_repeat_ngram": 3},
    ],
)
def test_captured_decoding_gives_the_tokens_of_the_cpu(compile, rows, config):
    model = build(DRY, torch.float32)
    with torch.no_grad():
        for p in model.transformer.h.parameters():  # far from uniform: no token is nearly a tie
            p.mul_(6)
    prompts = [[row + 1, 7, 9] for row in range(rows)]
    options = gpt2.GenerateConfig(max_new_tokens=40, eos=None, **config)
    got = gpt2.generate(model, prompts, options, compile=compile)
    assert got == gpt2.generate(model.cpu(), prompts, options)


def test_checkpointing_holds_little_compiled_or_not():
    deep = replace(DRY, n_layer=12)
    peaks = {}
    for how in ("compiled", "checkpointing", "compiled checkpointing"):
        model = build(deep, torch.bfloat16).train()
        stepper = Stepper(model, gpt2.TrainConfig(steps=1, **HOW[how]))
        stepper([batch(16, 1024)], 1)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        stepper([batch(16, 1024)], 2)
        peaks[how] = torch.cuda.max_memory_allocated() - before
    assert peaks["checkpointing"] < peaks["compiled"] / 2
    assert peaks["compiled checkpointing"] < peaks["compiled"] / 2


@pytest.mark.parametrize("how", ["eager", "graph"])
def test_a_steps_dropout_is_its_numbers_alone(how):
    """Whether a graph is captured in this step or was before, and how many steps came before."""
    config = gpt2.TrainConfig(steps=3, **HOW[how])
    late = Stepper(build(CONFIG, torch.float32, 0.5).train(), config)
    torch.cuda.manual_seed(7)
    want = late([batch()], 3, 0.0).tolist()
    early = Stepper(build(CONFIG, torch.float32, 0.5).train(), config)
    steps = [early([batch()], step, 0.0).tolist() for step in (1, 2, 3)]
    assert steps[2] == pytest.approx(want, rel=1e-6)
    assert steps[1] != pytest.approx(want, rel=1e-4)
    plain = Stepper(build(CONFIG, torch.float32, 0.5).train(), gpt2.TrainConfig(steps=3))
    assert plain([batch()], 3, 0.0).tolist() == pytest.approx(want, rel=1e-5)


def test_the_callers_generators_are_left_alone_by_a_graph():
    stepper = Stepper(build(CONFIG, torch.float32, 0.5).train(), gpt2.TrainConfig(steps=3))
    torch.cuda.manual_seed(3)
    want = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(3)
    for step in (1, 2):
        stepper([batch()], step)
    assert torch.equal(torch.rand(4, device="cuda"), want)


@pytest.mark.parametrize("change", ["disabled", "memory", "eject"])
def test_a_graph_is_not_replayed_on_what_was_changed(change):
    model = build(DRY, torch.float32).train()
    stepper = Stepper(model, gpt2.TrainConfig(steps=3))
    stepper([batch()], 1)
    if change == "disabled":
        with lora.disabled(model), pytest.raises(RuntimeError, match="changed between two steps"):
            stepper([batch()], 2)
        stepper([batch()], 2)
        return
    if change == "memory":
        p = lora.trainable_parameters(model)[0]
        p.data = p.data.clone()
    else:
        lora.eject(model)
    with pytest.raises(RuntimeError, match="changed between two steps"):
        stepper([batch()], 2)


def test_what_was_compiled_is_called_in_each_step_and_groups_have_their_rates():
    model = build(DRY, torch.float32).train()
    wrapped = torch.compile(model, backend="eager")
    calls: list[int] = []
    wrapped.register_forward_hook(lambda *_: calls.append(1))
    groups = lora.parameter_groups(model, lr=1e-3)
    stepper = Stepper(wrapped, gpt2.TrainConfig(steps=3), groups)
    figures = [stepper([batch()], step, 0.5).tolist() for step in (1, 2, 3)]
    assert len(calls) == 3
    other = build(DRY, torch.float32).train()
    bare = Stepper(other, gpt2.TrainConfig(steps=3), lora.parameter_groups(other, lr=1e-3))
    want = [bare([batch()], step, 0.5).tolist() for step in (1, 2, 3)]
    for mine, theirs in zip(figures, want, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-5)
    assert [float(g["lr"]) for g in bare.optimizer.param_groups] == pytest.approx([5e-4, 8e-3])


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_end_to_end_step_as_documents_padded(how, dtype):
    """One shape whatever they are, so that nothing is compiled or captured anew."""
    texts = [[i % 1000 + 1] * (20 + 37 * i % 300) for i in range(12)]
    lengths = torch.tensor([len(text) for text in texts])
    data = gpt2.Dataset(
        np.array([i for text in texts for i in text], np.int32),
        lengths.cumsum(0).numpy(),
        np.zeros(12, np.int32),
    )
    budget = {"tokens_per_batch": 1024, "seed": 0}
    rows = list(gpt2.batches(data, tokens_per_batch=1024, packing=True, seed=0, epoch=0))
    model = build(DRY, dtype).train()
    stepper = Stepper(model, gpt2.TrainConfig(steps=3, lr=1e-9, packing=True, **budget, **HOW[how]))
    for step, row in enumerate(rows, 1):
        loss = stepper([row], step).tolist()[0]
        starts = row.documents.tolist()
        with torch.no_grad():
            alone = [
                model(row.idx[:, a:b].cuda(), row.labels[:, a:b].cuda())
                for a, b in itertools.pairwise(starts)
                if b > a
            ]
        wanted = float(torch.stack(alone).sum()) / row.n_tokens
        assert loss == pytest.approx(wanted, rel=2e-5 if dtype == torch.float32 else 1e-2)
    if stepper.graphs is not None:
        assert len(stepper.graphs.captured) <= 1


def test_the_weight_that_is_read_is_the_one_in_force():
    """After replays of a graph, which write to the factors unseen, and after a write to `.data`."""
    model = build(DRY, torch.float32).train()
    layer = model.transformer.h[0].attn.c_attn
    update = layer.updates["default"]
    stepper = Stepper(model, gpt2.TrainConfig(steps=101, lr=1e-3))
    before = layer.weight.detach().clone()
    for step in range(1, 102):
        stepper([batch(1, 64)], step)
    assert stepper.graphs is not None
    assert stepper.graphs.captured

    @torch.no_grad()
    def check() -> None:
        want = layer.base.weight + 2 * (update.B @ update.A).t()
        torch.testing.assert_close(layer.weight, want, rtol=1e-5, atol=1e-6)
        with lora.merged(model):
            torch.testing.assert_close(layer.weight, want, rtol=1e-5, atol=1e-6)

    check()
    assert (layer.weight - before).norm() > 1e-3 * before.norm()
    update.B.data.mul_(-3)
    check()
