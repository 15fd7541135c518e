"""Documents end to end in one row learn what they learn alone."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch.nn import functional as F

import gpt2
import lora
from gpt2 import GPT2, IGNORE, Dataset, GPT2Config, TrainConfig, batches, encode, train
from gpt2.cache import Documents, KVCache
from gpt2.fast.attention import attend
from gpt2.fast.dropout import drop
from tests.toys import randomize

DRY = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
CONFIG = GPT2Config(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=20, **DRY)
TEXTS = [
    gpt2.Example("3 4", "5 6 7"),
    gpt2.Example("8", "9 8 1 2 3 4 11"),
    gpt2.Example("", "12 13"),
    gpt2.Example("14", "15"),
    gpt2.Example("2 2 2", "3 3 3 3 1 1 1 1"),
]


class Words:
    """A tokenizer of numbers with spaces between."""

    eos = 0

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


def model(**changes) -> GPT2:
    torch.manual_seed(0)
    return GPT2(dataclasses.replace(CONFIG, **changes)).double()


def data(*, answer_only: bool = False) -> Dataset:
    return encode(TEXTS, Words(), answer_only=answer_only)


def row(examples: Dataset) -> gpt2.Batch:
    (batch,) = batches(examples, tokens_per_batch=64, packing=True, seed=0, epoch=0)
    return batch


def gradients(network: GPT2) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    return found


def exact_loss(network, idx, labels, documents=None) -> torch.Tensor:
    """The summed loss in float64."""
    logits = network(idx, documents=documents)
    return F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("answer_only", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_loss_and_gradients_are_those_of_each_document_alone(answer_only, adapted):
    network, examples = model(), data(answer_only=answer_only)
    if adapted:
        lora.inject(network, r=3, targets=("c_attn", "c_proj"), seed=0, dtype=torch.float64)
        randomize(network)
    batch = row(examples)
    packed = exact_loss(network, batch.idx, batch.labels, batch.documents)
    packed.backward()
    found = gradients(network)
    alone = torch.zeros((), dtype=torch.float64)
    for ids, labels in examples:
        loss = exact_loss(network, ids[None], labels[None])
        loss.backward()
        alone += loss.detach()
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-10)
    for name, wanted in gradients(network).items():
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-10)
    own = network(batch.idx, batch.labels, documents=batch.documents)  # in float32
    torch.testing.assert_close(own.double(), alone, rtol=1e-6, atol=0)
    assert batch.n_tokens == sum(int((labels[1:] != IGNORE).sum()) for _, labels in examples)


def test_editing_a_document_leaves_the_others_bits():
    network, batch = model().float().train(), row(data())
    starts = batch.documents.tolist()
    before = network(batch.idx, documents=batch.documents)
    for start, end in itertools.pairwise(starts):
        if start == end:
            continue
        edited = batch.idx.clone()
        edited[:, start:end] = (edited[:, start:end] + 1) % 20
        after = network(edited, documents=batch.documents)
        assert torch.equal(before[:, :start], after[:, :start])
        assert torch.equal(before[:, end:], after[:, end:])
        assert not torch.equal(before[:, start:end], after[:, start:end])


def test_the_mask_says_what_documents_one_by_one_say(monkeypatch):
    q, k, v = torch.randn(3, 1, 2, 10, 4, dtype=torch.float64).unbind()
    documents = Documents(torch.tensor([0, 3, 3, 9, 10], dtype=torch.int32), 10, 10)
    one_by_one = attend(q, k, v, documents, 0.0)
    monkeypatch.setattr("gpt2.fast.attention.on_cpu", lambda device: False)
    torch.testing.assert_close(attend(q, k, v, documents, 0.0), one_by_one)
    assert documents.positions().tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 5, 0]]


def test_attention_keeps_its_dropout_on_a_cpu(monkeypatch):
    rates: list[float] = []
    monkeypatch.setattr("gpt2.fast.attention.drop", lambda x, p: (rates.append(p), drop(x, p))[1])
    batch = row(data())
    model(attn_pdrop=0.25).train()(batch.idx, documents=batch.documents)
    documents = sum(a < b for a, b in itertools.pairwise(batch.documents.tolist()))
    assert rates == [0.25] * 2 * documents


def test_attention_that_drops_is_torchs_but_for_the_draws():
    q, k, v = torch.randn(3, 2, 2, 10, 4, dtype=torch.float64).unbind()
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attend(q, k, v, None, 0.5, lambda weights, _: weights), want)


def test_documents_of_several_rows_or_beside_a_cache_are_refused():
    cache = KVCache(CONFIG, 1, 12, torch.float64, torch.device("cpu"))
    for rows, starts, held in ((2, [0, 5], None), (1, [[0, 5]], None), (1, [0, 5], cache)):
        with pytest.raises(ValueError, match="Documents lie in one row, without a cache"):
            model()(torch.ones(rows, 5, dtype=torch.long), None, held, torch.tensor(starts))


def losses(network: GPT2, **config) -> list[float]:
    records = train(network, data(), TrainConfig(epochs=6, lr=1e-2, **config))
    return [record.loss for record in records]


def test_training_packed_is_training_padded():
    """All five examples make one batch either way."""
    first, second = model(), model()
    packed = losses(first, tokens_per_batch=64, packing=True)
    padded = losses(second, batch_size=5)
    assert len(packed) == len(padded) == 6
    assert packed == pytest.approx(padded, abs=1e-5)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_a_token_budget_trains_in_few_shapes_and_repeats_itself(packing):
    config = {"tokens_per_batch": 24, "packing": packing, "accumulate": 2}
    assert losses(model(attn_pdrop=0.1), **config) == losses(model(attn_pdrop=0.1), **config)
    assert losses(model(), compile=False, **config)[-1] < losses(model(), **config)[0]


def test_compiled_and_checkpointed_packing_learn_the_same():
    config = {"tokens_per_batch": 64, "packing": True}
    eager = losses(model().float(), **config)
    compiled = losses(model().float(), **config, compile=True)
    assert compiled == pytest.approx(eager, abs=1e-4)
    assert losses(model().float(), **config, checkpointing=True) == eager


def test_attention_dropout_is_never_lost_in_silence(monkeypatch):
    """As on a GPU, whose kernel has none."""
    config = {"tokens_per_batch": 40, "packing": True}
    losses(model(attn_pdrop=0.1), **config)
    monkeypatch.setattr("gpt2.fast.devices.on_cpu", lambda device: False)
    with pytest.raises(
        ValueError, match="takes no dropout in attention: load the base with dropout=0"
    ):
        losses(model(attn_pdrop=0.1), **config)


def test_a_row_moves_whole():
    batch = row(data())
    assert torch.equal(batch.to(torch.device("cpu")).documents, batch.documents)
    assert batch.padded(*batch.idx.shape) is batch


def test_a_steps_kernel_looks_no_further_than_the_longest_document(monkeypatch):
    """A GPU's kernel is begun for each tile up to there, of each document."""
    seen: list[int] = []
    monkeypatch.setattr(
        "gpt2.model.attend", lambda *given: (seen.append(given[3].longest), attend(*given))[1]
    )
    examples = encode(["1 2 3 " * 60, *["4 5 6 7"] * 100], Words())
    config = TrainConfig(steps=1, tokens_per_batch=512, packing=True)
    list(train(model(block_size=1024), examples, config))
    assert set(seen) == {181}
