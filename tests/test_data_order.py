"""The order of an epoch, the batches of a token budget, and what a row of documents holds."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt2 import IGNORE, Batch, Dataset, TrainConfig, batches, encode, total_steps
from gpt2.data.batches import Buckets, Rows
from gpt2.data.order import shuffled


class Numbers:
    """A tokenizer of texts such as "7*3": the id 7, three times."""

    eos = 0

    def encode(self, text: str) -> list[int]:
        number, _, times = text.partition("*")
        return [int(number)] * int(times) if text else []


def dataset(lengths: list[int]) -> Dataset:
    """Example i is the id i + 1, so many times."""
    texts = (f"{i}*{length}" for i, length in enumerate(lengths, 1))
    return encode(texts, Numbers(), eos=False)


def log_normal(median: float, sigma: float, n: int) -> list[int]:
    drawn = np.random.default_rng(0).lognormal(np.log(median), sigma, n)
    return np.clip(np.round(drawn), 2, 1024).astype(int).tolist()


def held(batch: Batch) -> dict[int, int]:
    """The examples of a batch, and how many tokens it has of each."""
    ids, counts = batch.idx[batch.idx > 0].unique(return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


# the order


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 10**6), st.integers(0, 99))
def test_the_order_is_a_permutation(n, seed, epoch, stream):
    found = shuffled(np.arange(n), n, seed=seed, epoch=epoch, stream=stream)
    assert np.array_equal(np.sort(found), np.arange(n))


@given(st.integers(1, 10**12), st.integers(0, 2**32), st.integers(0, 9))
def test_a_position_is_asked_for_alone(n, seed, epoch):
    some = np.unique(np.linspace(0, n - 1, 7).astype(np.int64))
    together = shuffled(some, n, seed=seed, epoch=epoch)
    alone = [int(shuffled(some[i : i + 1], n, seed=seed, epoch=epoch)[0]) for i in range(len(some))]
    assert together.tolist() == alone
    assert len({*alone}) == len(alone)
    assert min(alone) >= 0
    assert max(alone) < n


def test_epochs_seeds_and_streams_differ():
    orders = {
        tuple(shuffled(np.arange(50), 50, seed=seed, epoch=epoch, stream=stream))
        for seed in range(5)
        for epoch in range(5)
        for stream in range(5)
    }
    assert len(orders) == 125
    # And they stay what they are, so that a run of an older version is resumed.
    few = shuffled(np.arange(9), 9, seed=1, epoch=2, stream=3)
    assert few.tolist() == [6, 7, 4, 5, 0, 3, 1, 2, 8]
    many = shuffled(np.array([0, 10**6]), 10**9, seed=5, epoch=0)
    assert many.tolist() == [940009088, 644860774]


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_are_about_equally_frequent(n):
    draws, every = 3000, list(itertools.permutations(range(n)))
    orders = (shuffled(np.arange(n), n, seed=0, epoch=epoch) for epoch in range(draws))
    counts = Counter(tuple(order.tolist()) for order in orders)
    expected, freedom = draws / len(every), len(every) - 1
    chi_squared = sum((counts[order] - expected) ** 2 / expected for order in every)
    assert chi_squared < freedom + 4 * (2 * freedom) ** 0.5


def test_neighbours_do_not_stay_neighbours():
    n = 10_000
    order = shuffled(np.arange(n), n, seed=0, epoch=0)
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.04
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04
    assert (np.abs(np.diff(order)) == 1).sum() < 10


# batches of a token budget


WAYS = [{"batch_size": 3}, {"tokens_per_batch": 64}, {"tokens_per_batch": 64, "packing": True}]


@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=70),
    way=st.sampled_from(WAYS),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 9),
    data=st.data(),
)
def test_every_example_once_an_epoch_from_any_batch(lengths, way, seed, epoch, data):
    examples = dataset(lengths)
    found = list(batches(examples, **way, seed=seed, epoch=epoch))
    counted = [(i, n) for batch in found for i, n in held(batch).items()]
    assert sorted(counted) == list(enumerate(lengths, 1))
    if "batch_size" in way:
        assert [len(batch.idx) for batch in found[:-1]] == [3] * (len(found) - 1)
    for batch in found:
        longest = max(held(batch).values())
        assert batch.documents is not None or batch.idx.shape[1] == longest
        for ids, labels in zip(batch.idx, batch.labels, strict=True):
            learnt = labels != IGNORE
            assert torch.equal(labels[learnt], ids[learnt])
            # What is padding is on the right.
            assert batch.documents is not None or not learnt[int(learnt.sum()) :].any()
        assert way.get("tokens_per_batch", 10**9) >= batch.idx.numel()
        assert batch.n_tokens == int((batch.labels[:, 1:] != IGNORE).sum())
        assert batch.n_tokens == sum(n - 1 for n in held(batch).values())
    start = data.draw(st.integers(0, len(found)))
    rest = list(batches(examples, **way, seed=seed, epoch=epoch, start=start))
    assert [b.idx.tolist() for b in rest] == [b.idx.tolist() for b in found[start:]]
    config = TrainConfig(epochs=3, accumulate=2, **way)
    assert total_steps(examples, config) == 3 * -(-len(found) // 2)


@pytest.mark.parametrize("way", WAYS, ids=["counted", "buckets", "rows"])
def test_seed_and_epoch_fix_the_batches(way):
    examples = dataset(log_normal(12, 0.5, 100))

    def drawn(seed, epoch):
        return [tuple(held(batch)) for batch in batches(examples, **way, seed=seed, epoch=epoch)]

    assert drawn(1, 0) == drawn(1, 0)
    orders = [drawn(seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert all(one != other for one, other in itertools.combinations(orders, 2))
    assert len({len(order) for order in orders}) == 1  # any epoch has as many batches


def padding(examples: Dataset, made: type[Buckets | Rows]) -> tuple[float, int]:
    """The share of padding of an epoch of batches padded to their shapes, and those shapes."""
    tokens, shapes, plan = 0, set(), made(examples, 16_384)
    how = {"tokens_per_batch": 16_384, "packing": made is Rows}
    for batch in batches(examples, **how, seed=0, epoch=0):
        shape = plan.shape(batch.idx.shape[1], 1024)
        tokens += batch.padded(*shape).idx.numel()
        shapes.add(shape)
    return 1 - examples.n_tokens / tokens, len(shapes)


@pytest.mark.parametrize(
    ("median", "sigma", "n", "most"),
    [(48, 0.27, 16_000, 8), (320, 0.59, 4_000, 12), (48, 0.5, 16_000, 16)],
)
def test_a_tenth_is_padding_at_most_and_shapes_are_few(median, sigma, n, most):
    examples = dataset(log_normal(median, sigma, n))
    share, shapes = padding(examples, Buckets)
    assert share <= 0.1
    assert shapes <= most
    share, shapes = padding(examples, Rows)
    assert share <= 0.02
    assert shapes == 1


def test_a_row_tells_where_each_document_begins():
    examples = dataset([5, 3, 4, 2, 6])
    (batch,) = batches(examples, tokens_per_batch=100, packing=True, seed=0, epoch=0)
    starts = batch.documents.tolist()
    assert starts[0] == 0
    assert starts[-1] == batch.idx.shape[1]
    assert starts == sorted(starts)
    documents = [batch.idx[0, a:b] for a, b in itertools.pairwise(starts) if b > a]
    assert {(int(d[0]), len(d)) for d in documents if d[0]} == {*enumerate([5, 3, 4, 2, 6], 1)}
    for a, b in itertools.pairwise(starts):
        if b > a and batch.idx[0, a]:
            assert batch.labels[0, a] == IGNORE  # no document says how the next begins
            assert torch.equal(batch.labels[0, a + 1 : b], batch.idx[0, a + 1 : b])
        else:
            assert b - a <= 6
            assert (batch.labels[0, a:b] == IGNORE).all()


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ({}, "Give batch_size, or tokens_per_batch"),
        ({"batch_size": 1, "tokens_per_batch": 9}, "Give batch_size, or tokens_per_batch"),
        ({"batch_size": 1, "packing": True}, "or tokens_per_batch with packing"),
        ({"tokens_per_batch": 6}, "tokens_per_batch is 6 and the longest example has 7 tokens"),
        ({"tokens_per_batch": 6, "packing": True}, "raise it, or cut the examples with max_length"),
    ],
)
def test_a_size_that_cannot_be_is_refused(way, said):
    with pytest.raises(ValueError, match=said):
        list(batches(dataset([7, 3]), **way, seed=0, epoch=0))


def test_a_config_takes_one_size():
    for wrong, said in (
        ({"batch_size": 2, "tokens_per_batch": 9}, "batch_size or tokens_per_batch"),
        ({"packing": True}, "packing takes tokens_per_batch"),
        ({"tokens_per_batch": 0}, "tokens_per_batch must be an integer of at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            TrainConfig(steps=1, **wrong)
