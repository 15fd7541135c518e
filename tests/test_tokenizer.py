import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.generation import generate
from gpt2.sampling import GenerateConfig
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


def test_opening_reads_no_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    Tokenizer()
    assert not list(tmp_path.iterdir())


TEXTS = [
    "Hello, world! It's  2024\n\n\tand 😀 naïve — façade… '' \u00a0\u200b\x00\x7f\xad",
    "日本語のテキスト、Ελληνικά، العربية, हिन्दी",
    "".join(map(chr, range(1, 0x250))),
    "    def f(x):\n        return x  # 12345678901234567890\r\n",
    "",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "new"
    Tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="compares with transformers (extra: peers)")


@pytest.fixture(scope="module")
def theirs(transformers, saved):
    return transformers.AutoTokenizer.from_pretrained(saved)


def test_the_same_bytes_each_time_and_nothing_else(saved, tokenizer, tmp_path):
    names = ["merges.txt", "tokenizer_config.json", "vocab.json"]
    assert sorted(file.name for file in saved.iterdir()) == names
    tokenizer.save_pretrained(tmp_path)
    for name in names:
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


def test_every_token_but_the_bytes_is_one_merge(saved, tokenizer):
    vocabulary = json.loads((saved / "vocab.json").read_text("utf-8"))
    assert sorted(vocabulary.values()) == list(range(50257))
    first, *merges = (saved / "merges.txt").read_text("utf-8").splitlines()
    assert first.startswith("#version")
    assert merges[:3] == ["Ġ t", "Ġ a", "h e"]  # as published
    assert len(merges) == 50_000
    assert [vocabulary[merge.replace(" ", "")] for merge in merges] == list(range(256, 50256))


@pytest.mark.parametrize("name", ["AutoTokenizer", "GPT2Tokenizer", "GPT2TokenizerFast"])
def test_transformers_reads_the_same_tokenizer(transformers, tokenizer, saved, name):
    theirs = getattr(transformers, name).from_pretrained(saved)
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eos
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text().filter(lambda text: "<|endoftext|>" not in text))  # an id of its own there
def test_any_text_has_the_same_ids_in_transformers(tokenizer, theirs, text):
    assert theirs(text)["input_ids"] == tokenizer.encode(text)


def test_a_pipeline_opens_the_model_with_its_tokenizer(transformers, demo, tokenizer, tmp_path):
    demo.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompt = "In the beginning"
    pipe = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    [made] = pipe(prompt, max_new_tokens=12, do_sample=False)
    config = GenerateConfig(max_new_tokens=12)
    [ids] = generate(demo, [tokenizer.encode(prompt)], config)
    assert made["generated_text"] == prompt + tokenizer.decode(ids)
