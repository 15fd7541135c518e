import importlib.resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import tokenizer as tokenizer_module
from gpt2.tokenizer import Tokenizer


def test_known_ids(tokenizer):
    # As published: spaces belong to the word that follows, and single bytes rank by their glyphs.
    assert tokenizer.encode("Hello, world!") == [15496, 11, 995, 0]
    assert tokenizer.encode("The capital of France is") == [464, 3139, 286, 4881, 318]
    assert tokenizer.encode("it's  2024\n\n") == [270, 338, 220, 48609, 628]
    assert tokenizer.encode("") == []
    assert (tokenizer.eos, tokenizer.vocab_size) == (50256, 50257)


def test_end_of_text_in_a_text_is_text(tokenizer):
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eos not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode([tokenizer.eos]) == "<|endoftext|>"


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.eos for i in ids)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 50256)))
def test_any_ids_decode(tokenizer, ids):
    assert isinstance(tokenizer.decode(ids), str)


def test_half_a_character_decodes_to_the_replacement_character(tokenizer):
    assert "�" in tokenizer.decode(tokenizer.encode("😀")[:1])


@pytest.mark.parametrize("bad", [-1, 50257, 2**70])
def test_ids_out_of_range(tokenizer, bad):
    with pytest.raises(ValueError, match=rf"0\.\.50256, got \[{bad}\]"):
        tokenizer.decode([1, bad, 2])


def test_damaged_ranks_are_refused(tmp_path, monkeypatch):
    real = importlib.resources.files("gpt2") / "assets" / "gpt2.tiktoken"
    damaged = tmp_path / "assets" / "gpt2.tiktoken"
    damaged.parent.mkdir()
    damaged.write_bytes(real.read_bytes()[:-1])
    monkeypatch.setattr(tokenizer_module, "files", lambda _: tmp_path)
    with pytest.raises(RuntimeError, match="sha256"):
        Tokenizer()


def test_opening_reads_no_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    Tokenizer()
    assert not list(tmp_path.iterdir())
