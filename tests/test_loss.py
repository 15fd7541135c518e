"""The next-token loss: against the formula, with and without logits, whatever the padding."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gpt2
import gpt2.fast.devices
import gpt2.fast.head
import lora
from gpt2 import IGNORE, next_token_loss, summed_loss
from gpt2.loss import summed
from tests import reference
from tests.toys import TINY, randomize, tiny_gpt2, untie

V = TINY.vocab_size


def some(batch: int, time: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and labels of which about half are not learnt."""
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(0, V, (batch, time), generator=generator)
    hidden = torch.rand(batch, time, generator=generator) < 0.5
    return idx, idx.masked_fill(hidden, IGNORE)


def by_hand(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    """Summed nats and count, one position at a time in float64."""
    total, count = 0.0, 0
    for row, wanted in zip(logits.double().numpy(), labels.numpy(), strict=True):
        for t in range(len(wanted) - 1):
            if wanted[t + 1] != IGNORE:
                total -= np.log(reference.softmax(row[t])[wanted[t + 1]])
                count += 1
    return total, count


class Plain(nn.Module):
    """A language model that is only a map from ids to logits."""

    def __init__(self, model: gpt2.GPT2) -> None:
        super().__init__()
        self.inner = model

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return self.inner(idx)


def frozen_head(seed: int = 0, dtype: torch.dtype = torch.float32) -> gpt2.GPT2:
    """A model in which only the blocks are trained."""
    model = tiny_gpt2(seed, dtype)
    model.transformer.wte.requires_grad_(False)
    model.transformer.wpe.requires_grad_(False)
    return model


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


# next_token_loss


def test_loss_is_the_formula():
    _, labels = some(3, 7)
    logits = torch.randn(3, 7, V, generator=torch.Generator().manual_seed(1))
    total, count = by_hand(logits, labels)
    assert next_token_loss(logits, labels).item() == pytest.approx(total / count, rel=1e-6)


def test_loss_is_computed_in_float32():
    _, labels = some(2, 9)
    logits = torch.randn(2, 9, V, generator=torch.Generator().manual_seed(1)).bfloat16() * 20
    loss = next_token_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, next_token_loss(logits.float(), labels))


@pytest.mark.parametrize("learnt", [[], [0]])
def test_loss_without_a_supervised_token_is_refused(learnt):
    labels = torch.full((2, 4), IGNORE)
    labels[:, learnt] = 5  # the first token follows nothing, so it is never predicted
    for time in (1, 4):
        with pytest.raises(ValueError, match="No token is supervised"):
            next_token_loss(torch.zeros(2, time, V), labels[:, :time])
    with pytest.raises(ValueError, match=r"batch_size \(10\) to match target batch_size \(8\)"):
        next_token_loss(torch.zeros(2, 5, V), labels)


# summed_loss: four ways through the head, one result


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize(
    ("chunk", "cached"),
    [(1, 2**21), (3, 99), (4096, 2**21), (4096, 700), (1, None), (3, None), (4096, None)],
)
@pytest.mark.parametrize("build", [frozen_head, tiny_gpt2], ids=["frozen head", "trained head"])
def test_summed_loss_and_gradients_are_those_of_all_logits(
    build, chunk, cached, smoothing, monkeypatch
):
    monkeypatch.setattr(gpt2.fast.devices, "positions_at_a_time", lambda _: chunk)
    if cached:
        monkeypatch.setattr(gpt2.fast.head, "CACHED", cached)  # 61 tokens in 1 to 11 slices
    else:
        monkeypatch.setattr(gpt2.fast.head, "_in_slices", gpt2.fast.head._chunk)  # as on a GPU
    model = build()
    idx, labels = some(3, 8)
    want = summed(model(idx), labels, smoothing)
    got = summed_loss(model, idx, labels, smoothing=smoothing)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert torch.equal(model(idx, labels, smoothing=smoothing), got)
    wanted = gradients(model, want)
    for name, gradient in gradients(model, got).items():
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-5 * scale, msg=name)


def test_frozen_heads_gradient_scales_with_the_loss():
    model = frozen_head()
    idx, labels = some(2, 6)
    once = gradients(model, summed_loss(model, idx, labels))
    thrice = gradients(model, summed_loss(model, idx, labels) * 3)
    for name in once:
        torch.testing.assert_close(thrice[name], 3 * once[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("head", ["as it is", "with a bias", "wrapped"])
def test_a_plain_model_is_called_for_its_logits_and_a_head_that_is_not_plain_for_its_own(head):
    model = frozen_head()
    if head == "with a bias":
        model.lm_head = nn.Linear(TINY.n_embd, V).requires_grad_(False)
        nn.init.normal_(model.lm_head.bias, generator=torch.Generator().manual_seed(0))
    elif head == "wrapped":
        model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())
    idx, labels = some(3, 8)
    want = summed(model(idx), labels)
    for each in (model, Plain(model)):
        torch.testing.assert_close(summed_loss(each, idx, labels), want, rtol=1e-6, atol=0)


class Largest(TorchDispatchMode):
    """Remembers the most elements that any new tensor has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return out


def test_logits_of_the_whole_batch_are_never_held_nor_kept_for_the_backward_pass(monkeypatch):
    """Chunks that are each small, but all kept, would add up."""
    monkeypatch.setattr(gpt2.fast.devices, "positions_at_a_time", lambda _: 4)
    config = gpt2.GPT2Config(n_layer=1, n_head=2, n_embd=8, block_size=32, vocab_size=5000)
    model = gpt2.GPT2(config).eval()
    model.transformer.wte.requires_grad_(False)
    idx = torch.randint(0, 5000, (4, 30), generator=torch.Generator().manual_seed(0))
    with Largest() as largest:
        summed_loss(model, idx, idx).backward()
    assert largest.elements <= model.lm_head.weight.numel()  # 40,000, where the logits are 600,000
    plain = Plain(copy.deepcopy(model))
    with Largest() as largest:
        summed_loss(plain, idx, idx).backward()
    assert largest.elements == 4 * 30 * 5000  # that is, the measure sees them

    def kept(module: nn.Module) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (sizes.append(tensor.numel()), tensor)[1], lambda tensor: tensor
        ):
            summed_loss(module, idx, idx)
        return sum(sizes)

    assert kept(model) < 4 * 29 * 5000 / 4 < kept(plain)


def test_without_gradients_the_loss_is_the_same():
    model = frozen_head()
    idx, labels = some(3, 8)
    want = summed_loss(model, idx, labels)
    with torch.no_grad():
        got = summed_loss(model, idx, labels)
    assert not got.requires_grad
    assert torch.equal(got, want.detach())


@pytest.mark.parametrize("form", ["_chunk", "_in_slices"])
def test_logits_far_from_zero_lose_nothing(form, monkeypatch):
    """Up there float32 is too coarse to hold the logsumexp itself."""
    generator = torch.Generator().manual_seed(0)
    weight, hidden = (  # eighths, whose products and sums float32 holds, in whatever order
        torch.randint(-16, 16, (n, 8), generator=generator) / 8 for n in (5000, 64)
    )
    weight[:, 0], hidden[:, 0] = 1, -1000
    targets = torch.randint(0, 5000, (64, 1), generator=generator)
    monkeypatch.setattr(gpt2.fast.head, "CACHED", 5000)
    for row, target in zip(hidden[:, None], targets, strict=True):
        want = nn.functional.cross_entropy((row @ weight.t()).double(), target)
        got, _ = getattr(gpt2.fast.head, form)(row, weight, target, 5000, True)
        assert got.item() == pytest.approx(want.item(), rel=0, abs=1e-5)


def test_an_adapter_on_the_head_learns():
    model = tiny_gpt2()
    untie(model.lm_head)
    lora.inject(model, r=2, targets=["c_attn", "lm_head"], seed=0)
    randomize(model)
    idx, labels = some(3, 8)
    count = (labels[:, 1:] != IGNORE).sum()
    want = next_token_loss(model(idx), labels) * count
    got = summed_loss(model, idx, labels)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    wanted = gradients(model, want)
    found = gradients(model, got)
    assert any(name.startswith("lm_head") for name in found)
    for name, gradient in found.items():
        assert gradient.any(), name
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_trained_head_is_applied_to_supervised_positions_only():
    model = tiny_gpt2()
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    idx, labels = some(3, 8)
    summed_loss(model, idx, labels)
    assert rows == [int((labels[:, 1:] != IGNORE).sum())]


@pytest.mark.parametrize("build", [frozen_head, tiny_gpt2], ids=["frozen head", "trained head"])
def test_no_supervised_token_sums_to_zero(build):
    model = build()
    idx, _ = some(2, 5)
    loss = summed_loss(model, idx, torch.full_like(idx, IGNORE))
    assert loss.item() == 0
    assert not any(g.any() for g in gradients(model, loss).values())


@pytest.mark.parametrize("build", [frozen_head, tiny_gpt2], ids=["frozen head", "trained head"])
def test_bfloat16_is_close_to_float32_and_sums_in_float32(build):
    idx, labels = some(4, 20)
    want = summed_loss(build(), idx, labels)
    got = summed_loss(build(dtype=torch.bfloat16), idx, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2e-2, atol=0)


def test_rows_that_pad_the_heads_weight_take_no_part():
    """As on a GPU, where the vocabulary is rounded up."""
    generator = torch.Generator().manual_seed(0)
    weight, hidden = (torch.randn(n, 8, generator=generator) for n in (V, 6))
    targets = torch.tensor([0, 5, 2, V - 1, 7, 0])
    want = gpt2.fast.head._chunk(hidden, weight, targets, V, True)
    padded = nn.functional.pad(weight, (0, 0, 0, 3), value=9.0)
    for got, wanted in zip(
        gpt2.fast.head._chunk(hidden, padded, targets, V, True), want, strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


# Padding and order


@st.composite
def ragged(draw) -> list[tuple[list[int], int]]:
    """Rows of ids, each with how many of its first ones are not learnt."""
    ids = st.lists(st.integers(0, V - 1), min_size=2, max_size=12)
    return [
        (row, draw(st.integers(0, len(row) - 1)))
        for row in draw(st.lists(ids, min_size=1, max_size=5))
    ]


MODELS = {"frozen head": frozen_head(), "trained head": tiny_gpt2()}


@settings(max_examples=40, deadline=None)
@given(
    rows=ragged(),
    data=st.data(),
    extra=st.integers(0, 6),
    filler=st.integers(0, V - 1),
    kind=st.sampled_from(sorted(MODELS)),
)
def test_padding_and_order_never_change_the_loss_or_its_gradient(rows, data, extra, filler, kind):
    model = MODELS[kind]
    alone = [_padded([row], 0, 0) for row in rows]
    want = sum(summed_loss(model, *batch) for batch in alone)
    shuffled = data.draw(st.permutations(rows))
    got = summed_loss(model, *_padded(shuffled, extra, filler))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    wanted = gradients(model, want)
    for name, gradient in gradients(model, got).items():
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5 * (1 + scale))


def _padded(rows, extra: int, filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(ids) for ids, _ in rows) + extra
    idx = torch.full((len(rows), width), filler)
    labels = torch.full_like(idx, IGNORE)
    for i, (ids, ignored) in enumerate(rows):
        idx[i, : len(ids)] = torch.tensor(ids)
        labels[i, ignored : len(ids)] = idx[i, ignored : len(ids)]
    return idx, labels
