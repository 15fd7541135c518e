"""Tokens on disk: made once, reused, never half; and what a training set of millions costs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpt2
from gpt2 import batches, encode, open_data, read_examples
from gpt2.data.dataset import without_overlap
from gpt2.data.store import open_store
from tests.toys import Letters, split

ROWS = [
    {"question": f"What is {i}?", "answer": f"It is {'very ' * (i % 7)}{i}."} for i in range(300)
]


@pytest.fixture
def file(tmp_path) -> Path:
    found = tmp_path / "data.jsonl"
    found.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return found


def same(one: gpt2.Dataset, other: gpt2.Dataset) -> bool:
    return len(one) == len(other) and all(
        a.tolist() == b.tolist() and c.tolist() == d.tolist()
        for (a, c), (b, d) in zip(one, other, strict=True)
    )


def store_of(file: Path, cache: str = "cache") -> Path:
    (store,) = (file.parent / cache).glob(f"{file.name}.*.tokens")
    return store


class Told:
    """The lines that are told of a store."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def open(self, file: Path, tokenizer: object = None, **options) -> gpt2.Dataset:
        self.lines = []
        how = {"cache": file.parent / "cache", "tell": self.lines.append, **options}
        return open_data(file, tokenizer or Letters(), **how)


class Hooked(Letters):
    """Does something at the hundredth text."""

    def __init__(self, hook) -> None:
        self.hook, self.texts = hook, 0

    def encode(self, text: str) -> list[int]:
        self.texts += 1
        if self.texts == 100:
            self.hook()
        return super().encode(text)


def test_a_store_holds_what_memory_holds(file, tokenizer):
    for options in ({}, {"answer_only": True}, {"eos": False, "max_length": 9}):
        stored = Told().open(file, tokenizer, **options)
        held = encode(read_examples(file), tokenizer, **options)
        assert len(held) == 300
        assert same(stored, held)
        for name in ("lengths", "histogram", "by_length", "prompts"):
            assert getattr(stored, name).tolist() == getattr(held, name).tolist()
        for name in ("truncated", "n_tokens", "fingerprint", "longest", "unlearnable"):
            assert getattr(stored, name) == getattr(held, name)
        assert tuple(vars(stored)["extremes"]) == held.extremes  # without a look at the ids


def test_a_store_is_made_once_and_found_again(file):
    told = Told()
    first = told.open(file)
    assert len(told.lines) == 1
    assert "there are none yet" in told.lines[0]
    again = told.open(file)
    assert told.lines == []
    assert same(first, again)
    assert [*(file.parent / "cache").iterdir()] == [store_of(file)]


def test_small_data_stays_in_memory_and_other_data_lies_beside_its_file(file, monkeypatch):
    open_data(file, Letters())
    assert [f.name for f in file.parent.iterdir()] == ["data.jsonl"]
    monkeypatch.setattr("gpt2.data.store.SMALL", 10)
    stored = open_data(file, Letters())
    assert sorted(f.name for f in file.parent.iterdir()) == ["data.jsonl", "data.jsonl.tokens"]
    assert same(stored, encode(read_examples(file), Letters()))


def test_ids_that_do_not_fit_two_bytes_take_four(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt2.data.dataset.ENCODED", 2)
    file = tmp_path / "data.jsonl"
    texts = ["abc", "de", "f😀g", "h", "😀"]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for tokenizer, size in ((Letters(), 4), (gpt2.Tokenizer(), 2)):
        assert same(Told().open(file, tokenizer), encode(texts, tokenizer))
        assert np.load(store_of(file) / "ids.npy", mmap_mode="r").itemsize == size


def test_it_is_made_again_where_something_is_another_now(file):
    told = Told()
    told.open(file)
    for options, said in (
        ({"max_length": 10}, "max_length was 1024 and is 10"),
        ({"max_length": 10, "answer_only": True, "tokenizer": gpt2.Tokenizer()}, "tokenizer was"),
        ({"max_length": 20, "eos": False, "tokenizer": gpt2.Tokenizer()}, "is 20"),
        ({"fields": {"question": "answer", "answer": "question"}}, "fields was None"),
    ):
        stored = told.open(file, **options)
        assert said in told.lines[0]
        tokenizer, fields = options.pop("tokenizer", Letters()), options.pop("fields", None)
        assert same(stored, encode(read_examples(file, fields), tokenizer, **options))


def test_a_source_that_changed_is_read_again(file):
    told = Told()
    told.open(file)
    text = file.read_text()
    file.write_text(text.replace("What", "When"))  # the same size
    os.utime(file, ns=(1, 1))
    stored = told.open(file)
    assert "mtime_ns was" in told.lines[0]
    assert same(stored, encode(read_examples(file), Letters()))
    with file.open("a") as more:
        more.write(json.dumps(ROWS[0]) + "\n")
    assert len(told.open(file)) == 301
    assert "bytes was" in told.lines[0]


def test_files_of_one_name_size_and_time_share_a_cache_and_no_tokens(tmp_path):
    """As an archive unpacks them; and none makes the other's store anew."""
    files = [tmp_path / folder / "train.jsonl" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text(json.dumps({"text": f"It is {file.parent.name}."}) + "\n")
        os.utime(file, ns=(1, 1))
    told = Told()
    for lines in (1, 0):
        for file in files:
            stored = told.open(file, cache=tmp_path / "cache")
            assert same(stored, encode(read_examples(file), Letters()))
            assert len(told.lines) == lines


def header(store: Path, **changes: object) -> None:
    file = store / "header.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda store: os.truncate(store / "ids.npy", 200), "mmap length is greater than file"),
        (lambda store: (store / "by_length.npy").unlink(), "by_length.npy"),
        (lambda store: header(store, format=2), "format was 2 and is 5"),
        (lambda store: (store / "header.json").write_text("{"), "header.json"),
    ],
)
def test_a_store_that_cannot_be_used_is_told_and_made_again(file, spoil, said):
    told = Told()
    whole = told.open(file)
    spoil(store_of(file))
    again = told.open(file)
    assert said in told.lines[0]
    assert same(again, encode(read_examples(file), Letters()))
    assert len(whole) == 300


def test_what_is_no_store_is_never_replaced(file):
    Told().open(file)
    place = store_of(file)
    shutil.rmtree(place)
    place.mkdir()
    (place / "mine").write_text("dear")
    with pytest.raises(ValueError, match="is in the way, and no store of tokens"):
        Told().open(file)
    with pytest.raises(FileNotFoundError, match=r"header\.json"):
        open_store(place)
    assert (place / "mine").read_text() == "dear"


def test_two_runs_may_make_it_at_once(file):
    def second() -> None:
        assert same(Told().open(file), encode(read_examples(file), Letters()))

    assert same(Told().open(file, Hooked(second)), encode(read_examples(file), Letters()))
    assert [*(file.parent / "cache").iterdir()] == [store_of(file)]


KILLED = """
import os, signal, sys, gpt2
from tests.toys import Letters
class Killed(Letters):
    def encode(self, text):
        os.kill(os.getpid(), signal.SIGKILL)
gpt2.open_data(sys.argv[1], Killed(), cache=sys.argv[2])
"""


def test_a_run_that_is_killed_leaves_no_store(file):
    cache = file.parent / "cache"
    ran = subprocess.run([sys.executable, "-c", KILLED, str(file), str(cache)], check=False)
    assert ran.returncode == -9
    assert not [*cache.glob("data.jsonl.*")]
    told = Told()
    assert same(told.open(file), encode(read_examples(file), Letters()))
    assert "there are none yet" in told.lines[0]


def test_a_store_that_is_not_finished_is_never_there(file):
    def interrupted() -> None:
        raise KeyboardInterrupt

    told = Told()
    with pytest.raises(KeyboardInterrupt):
        told.open(file, Hooked(interrupted))
    assert list((file.parent / "cache").iterdir()) == []
    before = told.open(file)
    with pytest.raises(KeyboardInterrupt):
        told.open(file, Hooked(interrupted), max_length=9)
    assert same(told.open(file), before)  # the one before is as it was
    assert told.lines == []


@pytest.mark.parametrize("way", [{"batch_size": 4}, {"tokens_per_batch": 200}])
def test_batches_of_a_store_are_those_of_memory(file, way, tokenizer):
    stored, held = Told().open(file, tokenizer), encode(read_examples(file), tokenizer)
    pairs = zip(
        batches(stored, **way, seed=1, epoch=2), batches(held, **way, seed=1, epoch=2), strict=True
    )
    assert all(a.idx.equal(b.idx) and a.labels.equal(b.labels) for a, b in pairs)


def test_the_faults_of_a_store_are_those_of_memory(file):
    lines = file.read_text().splitlines()
    for i in range(5, 300, 20):
        lines[i] = '{"text": 3}' if i % 40 else "no JSON"
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"the rest was not read") as one:
        read_examples(file)
    with pytest.raises(ValueError, match=r"data\.jsonl:6: ") as other:
        Told().open(file)
    assert str(other.value) == str(one.value)
    file.write_text('{"text": "a"}\n' * 90)
    with pytest.raises(ValueError, match=r"^90 examples leave no token .*: 1, 2, 3,"):
        Told().open(file, eos=False)
    with pytest.raises(FileNotFoundError, match="none"):
        Told().open(file.with_name("none.jsonl"))
    assert not list((file.parent / "cache").iterdir())


def test_a_tokenizer_that_fails_in_a_thread_is_heard(file):
    class Failing(Letters):
        def encode_many(self, texts: list[str]) -> object:
            raise ValueError("no such letter")

    with pytest.raises(ValueError, match="no such letter"):
        Told().open(file, tokenizer=Failing())
    assert not list((file.parent / "cache").iterdir())


def test_a_store_may_hold_a_side_of_a_split(file):
    learnt, held_out = (Told().open(file, side=side) for side in ((0.3, 1), (0, 0.3)))
    both = split(read_examples(file), 0.3)
    assert same(learnt, encode(both[0], Letters()))
    assert same(held_out, encode(both[1], Letters()))
    names = sorted(f.name for f in (file.parent / "cache").iterdir())
    assert [re.sub(r"\.\w{8}\.", ".", name) for name in names] == [
        "data.jsonl.0-0.3.tokens",
        "data.jsonl.0.3-1.tokens",
    ]
    for side, said in (((0, 1e-9), "to evaluate on"), ((1 - 1e-9, 1), "to learn")):
        with pytest.raises(ValueError, match=f"of 300 examples.*leaves none {said}"):
            Told().open(file, side=side)
    assert sorted(f.name for f in (file.parent / "cache").iterdir()) == names


def test_prompts_of_a_store_are_left_out_of_another(file, tokenizer):
    examples = read_examples(file)
    stored = Told().open(file, tokenizer)
    assert all(0 < n < length for n, length in zip(stored.prompts, stored.lengths, strict=True))
    kept = without_overlap(stored, encode(examples[9:200], tokenizer))
    assert same(kept, encode([*examples[:9], *examples[200:]], tokenizer))


# many texts in one call


def test_many_texts_have_the_ids_of_each(tokenizer):
    texts = ["", "a", " a", "Hello  world ", "\n\n", "é😀", "<|endoftext", "|>", "it's 12\t"]
    for some in (texts, [*texts, "x<|endoftext|>y"], [""], []):
        ids, ends = tokenizer.encode_many(some)
        found = [part[:-1].tolist() for part in np.split(ids, ends + 1)[:-1]]
        assert found == [tokenizer.encode(text) for text in some]
        assert all(ids[ends] == tokenizer.eos)


# millions


MEASURED = """
import sys, time
from pathlib import Path
from itertools import islice
import gpt2
from gpt2.data.store import open_store
from tests.toys import split

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

WAYS = (lambda tokens: {"tokens_per_batch": tokens, "packing": True},
    lambda tokens: {"tokens_per_batch": tokens}, lambda tokens: {"batch_size": tokens // 32})
before, began = anonymous(), time.perf_counter()
data = open_store(Path(sys.argv[1]))[0]
print((time.perf_counter() - began) * 1e3)
sizes = gpt2.GPT2Config(n_layer=1, n_head=1, n_embd=8, block_size=64, vocab_size=61)
most = 0
for way in WAYS:
    config = gpt2.TrainConfig(epochs=2, **way(1024))
    for record in islice(gpt2.train(gpt2.GPT2(sizes), data, config), 40):
        most = max(most, anonymous())
    for epoch in range(2):
        for batch in islice(gpt2.batches(data, **way(16384), seed=0, epoch=epoch), 100):
            pass
        next(gpt2.batches(data, **way(16384), seed=0, epoch=1, start=10))
        most = max(most, anonymous())
    print(most - before)
"""


def write_store(place: Path, n: int, length: int = 32) -> None:
    """A store of so many examples, without a source."""
    from gpt2.data.store import write

    random = np.random.default_rng(0)
    ends = np.cumsum(random.integers(length // 2, 3 * length // 2, n))
    ids = random.integers(0, 61, int(ends[-1]), np.int32)
    write(place, gpt2.Dataset(ids, ends, np.zeros(n, np.int32)), {})


def measured(place: Path) -> tuple[float, list[float]]:
    """Milliseconds to open; and MiB of anonymous memory above imports, packed, padded, counted."""
    command = [sys.executable, "-c", MEASURED, str(place)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(found[0]), [float(line) for line in found[1:]]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_data(tmp_path):
    """Of a training, whatever its batches. `LONG=1` takes 5,000,000 examples against 500,000."""
    more = 5_000_000 if os.environ.get("LONG") else 300_000
    found = []
    for n in (more // 10, more):
        write_store(tmp_path / "store", n)
        found.append(measured(tmp_path / "store"))
        shutil.rmtree(tmp_path / "store")
    (_, small), (opened, large) = found
    print(f"opened in {opened:.1f} ms; MiB: {small} for a tenth, {large} for all")
    assert opened <= 50
    assert max(large) <= 150
    assert len(large) == 3
    assert max(b - a for a, b in zip(small, large, strict=True)) <= 5
