"""Examples from files and lists to batches: what is read, learnt, cut, ordered and padded."""

from __future__ import annotations

import csv
import json
import re
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2 import (
    GPT2,
    IGNORE,
    Dataset,
    Example,
    GPT2Config,
    TrainConfig,
    batches,
    encode,
    evaluate,
    read_examples,
    stream_examples,
    train,
)
from gpt2.data.batches import collate
from tests.toys import TEXTS, Letters


def split(text: str) -> Example:
    question, answer = text.split("\nA:")
    return Example(question + "\nA:", answer)


def rows(data: Dataset) -> list[tuple[list[int], list[int]]]:
    return [(ids.tolist(), labels.tolist()) for ids, labels in data]


def written(folder: Path, *lines: object) -> Path:
    """A file of these lines: bytes as they are, anything else as JSON."""
    file = folder / "data.jsonl"
    file.write_bytes(
        b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
    )
    return file


# read_examples


def test_the_three_forms_are_read(tmp_path):
    file = written(
        tmp_path,
        {"text": "All of it. "},
        {"question": "Why?", "answer": "So."},
        b"",
        b"  \t\r",
        {"prompt": "Once", "completion": " upon\na time"},
        {"prompt": "", "completion": "é 😀"},
    )
    assert read_examples(file) == [
        Example("", "All of it. "),
        Example("Q: Why?\nA:", " So."),
        Example("Once", " upon\na time"),
        Example("", "é 😀"),
    ]
    assert read_examples(str(file)) == read_examples(file)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n', ["a", "b"]),
        # Where str.splitlines would cut.
        ('{"text": "one\u2028two\x85three"}'.encode(), ["one\u2028two\x85three"]),
    ],
)
def test_a_byte_order_mark_does_not_matter_and_a_line_ends_at_a_newline_only(
    tmp_path, content, texts
):
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)
    assert read_examples(file) == [Example("", text) for text in texts]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "\xff"}', "'text' is not UTF-8: '\\udcff'"),
        (json.dumps({"text": "a"}).encode("utf-16"), "Expecting value: line 1 column 1"),
        (b'{"text": "\\ud800"}', "'text' is not UTF-8: '\\ud800'"),
        (b"Q: Why?", "Expecting value: line 1 column 1"),
        (b"9" * 5000, "Exceeds the limit"),
        (["a", "list"], "got ['a', 'list']"),
        ({}, "got []"),
        ({"question": "a", "completion": "b"}, "got ['completion', 'question']"),
        ({"text": 3}, "'text' is 3, not a string"),
        ({"question": "a", "answer": None}, "'answer' is None, not a string"),
        ({"text": " \n"}, "'text' is empty"),
        ({"question": "", "answer": "b"}, "'question' is empty"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    file = written(tmp_path, {"text": "good"}, b"", line, {"text": "good"})
    with pytest.raises(ValueError, match=f"^{file}:3: ") as error:
        read_examples(file)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_lines_are_listed_until_there_are_ten(tmp_path):
    file = written(tmp_path, {"text": ""}, {"text": "good"}, b"{", b"\xff")
    with pytest.raises(ValueError, match=f"^{file}:1: .*; {file}:3: .*; {file}:4: ") as error:
        read_examples(file)
    assert f"{file}:2: " not in str(error.value)
    file = written(tmp_path, *[{"text": ""}] * 1000)
    with pytest.raises(ValueError, match="; the rest was not read.$") as error:
        read_examples(file)
    assert str(error.value).count(str(file)) == 10


@pytest.mark.parametrize("name", ["data.jsonl", "data.txt"])
def test_a_file_without_examples_is_refused(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(b"\n \n")
    with pytest.raises(ValueError, match="holds no examples"):
        read_examples(file)


PAIRS = [("Why?", "So."), ('Où, "là"?', "Ici,\nlà"), ("a\tb", "é 😀")]
AS_EXAMPLES = [Example(f"Q: {q}\nA:", f" {a}") for q, a in PAIRS]


def in_format(folder: Path, suffix: str, names: tuple[str, str] = ("question", "answer")) -> Path:
    """The pairs as a file of this format, with a column that is no part of an example."""
    rows = [{"id": str(i), **dict(zip(names, pair, strict=True))} for i, pair in enumerate(PAIRS)]
    file = folder / f"data{suffix}"
    if suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), file)
    elif suffix == ".json":
        file.write_text(json.dumps(rows, indent=1))
    elif suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        with file.open("w", encoding="utf-8-sig", newline="") as f:
            writer = csv.DictWriter(f, rows[0], dialect="excel-tab" if "t" in suffix else "excel")
            writer.writeheader()
            writer.writerows(rows)
    return file


FORMATS = [".jsonl", ".json", ".csv", ".tsv", ".parquet"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_examples(tmp_path, suffix):
    assert read_examples(in_format(tmp_path, suffix)) == AS_EXAMPLES
    own = in_format(tmp_path, suffix, ("frage", "antwort"))
    fields = {"question": "frage", "answer": "antwort"}
    assert read_examples(own, fields) == AS_EXAMPLES
    assert read_examples(own, fields, prompts=True) == AS_EXAMPLES
    as_they_are = [Example(*pair) for pair in PAIRS]
    assert read_examples(own, {"prompt": "frage", "completion": "antwort"}) == as_they_are
    assert read_examples(own, {"text": "antwort"}) == [Example("", answer) for _, answer in PAIRS]
    with pytest.raises(ValueError, match=r"got \['antwort', 'frage', 'id'\]"):
        read_examples(own)


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_fault_of_each_format_is_placed(tmp_path, suffix):
    file = in_format(tmp_path, suffix)
    place = {".json": ", item 1", ".parquet": ", row 1"}.get(suffix, r":\d")
    with pytest.raises(ValueError, match=f"^{file}{place}: has no 'frage', only "):
        read_examples(file, {"text": "frage"})


def test_a_json_file_may_have_strings_or_an_object_a_line(tmp_path):
    file = tmp_path / "data.json"
    file.write_text('["one", {"prompt": "two", "completion": " three"}]')
    assert read_examples(file) == [Example("", "one"), Example("two", " three")]
    file.write_text('\n{"text": "one"}\n{"text": "two"}\n')
    assert read_examples(file) == [Example("", "one"), Example("", "two")]
    file.write_text('["one",\n "two"')
    with pytest.raises(ValueError, match=f"^{file}: Expecting .*: line 2 column 7"):
        read_examples(file)


def test_plain_text_has_documents_between_blank_lines_and_a_prompt_a_line(tmp_path):
    file = tmp_path / "data.txt"
    file.write_bytes("\ufeff\nOne,\r\n two.\r\n\r\n \t\nThree é\n\n\n".encode())
    assert read_examples(file) == [Example("", "One,\n two."), Example("", "Three é")]
    prompts = [Example(text, "") for text in ("One,", " two.", "Three é")]
    assert read_examples(file, prompts=True) == prompts
    file.write_bytes(b"good\n\nbad \xff\n\ngood\n\xff\n")
    for prompts, line in ((False, 5), (True, 6)):
        fault = "'text' is not UTF-8"
        with pytest.raises(ValueError, match=f"^{file}:3: {fault}.*; {file}:{line}: {fault}"):
            read_examples(file, prompts=prompts)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "question;answer\na;b",
            ":1: one column, 'question;answer': cells seem to be separated by ';'; a .csv",
        ),
        ("question,answer\na,b\nonly", ":3: has more or fewer cells than the heading's 2"),
        ("question,answer\na,b,c", ":2: has more or fewer cells than the heading's 2"),
        ('text\n"a\nb"\n""', ":4: 'text' is empty"),
        ('text\n"never closed', ":2: not CSV (unexpected end of data)"),
    ],
)
def test_a_bad_row_of_a_table_is_named(tmp_path, text, said):
    file = tmp_path / "data.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{file}{said}")):
        read_examples(file)


def test_an_answer_to_a_prompt_is_a_reference_and_no_part_of_it(tmp_path):
    file = written(
        tmp_path,
        {"text": "As it is\nA:"},
        {"question": "Why?"},
        {"question": "Why?", "answer": None},
        {"question": "Why?", "answer": "So."},
        {"prompt": "Once"},
        {"prompt": "Once", "completion": " upon", "answer": "not this"},
        {"question": "Why?", "answer": ""},
    )
    why = "Q: Why?\nA:"
    assert read_examples(file, prompts=True) == [
        Example("As it is\nA:", ""),
        Example(why, ""),
        Example(why, ""),
        Example(why, " So."),
        Example("Once", ""),
        Example("Once", " upon"),
        Example(why, ""),
    ]
    again = read_examples(file, {"text": "frage"}, prompts=True)
    assert again == read_examples(file, prompts=True)


@pytest.mark.parametrize(
    "row",
    [
        {"answer": "a"},
        {"prompt": ""},
        {"question": " "},
        {"question": 3},
        {"question": "a", "prompt": "b"},
    ],
)
def test_a_row_that_is_no_prompt_is_named(tmp_path, row):
    file = written(tmp_path, {"text": "good"}, row)
    with pytest.raises(ValueError, match=f"^{file}:2: "):
        read_examples(file, prompts=True)


def test_a_row_with_two_forms_needs_fields(tmp_path):
    file = written(tmp_path, {"text": "a", "question": "b", "answer": "c"})
    with pytest.raises(ValueError, match=r"one of these alone \(name yours by fields\), got"):
        read_examples(file)
    assert read_examples(file, {"text": "text"}) == [Example("", "a")]


@pytest.mark.parametrize("name", ["data", "data.xlsx", "data.jsonl.gz"])
def test_a_format_that_is_not_read_names_those_that_are(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"has none of the endings that are read: \.jsonl, \.json"):
        read_examples(tmp_path / name)


def test_without_pyarrow_parquet_is_refused_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(RuntimeError, match=r"pip install 'lora-gpt2\[parquet\]'"):
        read_examples(tmp_path / "data.parquet")


@pytest.mark.parametrize(
    "line",
    [
        b"x" * 2_000_000,
        json.dumps({"text": ["x" * 1000] * 2000}).encode(),
        b'{"' + b"k" * 2_000_000 + b'": 1}',
    ],
)
def test_however_long_a_line_is_its_fault_is_short(tmp_path, line):
    file = written(tmp_path, *[line] * 3)
    for prompts in (False, True):
        with pytest.raises(ValueError, match=f"^{file}:1: ") as error:
            read_examples(file, prompts=prompts)
        assert len(str(error.value)) < 3 * (200 + len(str(file)))


def test_a_cell_may_be_as_long_as_a_line_of_json(tmp_path):
    file = tmp_path / "data.csv"
    file.write_text("text\n" + "x" * 200_000)
    assert read_examples(file) == [Example("", "x" * 200_000)]


def test_a_file_is_streamed_and_its_faults_come_last(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(f"{json.dumps({'text': 'x' * 1000})}\n" * 20_000 + "{\n")
    examples = stream_examples(file)
    assert next(examples) == Example("", "x" * 1000)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"^{file}:20001: Expecting"):
        for _ in examples:
            pass
    assert tracemalloc.get_traced_memory()[1] < 1_000_000  # of the file's 20 MB
    tracemalloc.stop()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        stream_examples(tmp_path / "nowhere.jsonl")  # at once, not at the first example


# encode


def test_a_text_is_learnt_whole_and_to_its_end(tokenizer):
    data = encode(iter(TEXTS), tokenizer)
    want = [[*tokenizer.encode(text), 50256] for text in TEXTS]
    assert rows(data) == [(ids, ids) for ids in want]
    pairs = list(map(split, TEXTS))  # whose prompts end where a token does
    for examples, options in ((TEXTS, {}), (TEXTS, {"answer_only": True}), (pairs, {})):
        assert rows(encode(examples, tokenizer, **options)) == rows(data)
    assert rows(encode(TEXTS[:1], tokenizer, eos=False))[0][0] == want[0][:-1]
    assert data.truncated == 0
    assert data.n_tokens == sum(map(len, want))
    assert data.lengths.tolist() == [len(ids) for ids in want]


def test_a_prompt_has_the_tokens_that_inference_sees(tokenizer):
    (ids, _), *_ = rows(encode([Example("The end", "ing")], tokenizer, eos=False))
    assert ids == tokenizer.encode("The end") + tokenizer.encode("ing")
    assert ids != tokenizer.encode("The ending")


def test_answer_only_learns_the_answer_and_its_end(tokenizer):
    data = encode(map(split, TEXTS), tokenizer, answer_only=True)
    for text, (ids, labels) in zip(TEXTS, data, strict=True):
        n = len(tokenizer.encode(split(text).prompt))
        assert set(labels[:n].tolist()) == {IGNORE}
        assert torch.equal(labels[n:], ids[n:])
        assert tokenizer.decode(labels[n:-1].tolist()) == split(text).completion
        assert labels[-1] == tokenizer.eos


def test_too_long_is_cut_and_counted():
    data = encode(["abc", "abcd", "abcde"], Letters(), max_length=4)
    assert [bytes(ids) for ids, _ in rows(data)] == [b"abc\0", b"abcd", b"abcd"]
    assert data.truncated == 2  # the second lost its end


@pytest.mark.parametrize(
    ("example", "options"),
    [
        (Example("", ""), {}),  # an end alone follows nothing
        (Example("", "a"), {"eos": False}),
        (Example("abcdef", "g"), {"answer_only": True, "max_length": 6}),  # the answer is cut away
        (Example("abc", ""), {"answer_only": True, "eos": False}),
    ],
)
def test_an_example_without_a_token_to_learn_is_named(example, options):
    with pytest.raises(ValueError, match=r"^2 examples leave no token to learn.*: 2, 4\. Remove"):
        encode(["fine", example, "fine", example], Letters(), **options)


@pytest.mark.parametrize(
    ("example", "options"),
    [
        (Example("", "a"), {}),  # its end
        (Example("a", "b"), {"answer_only": True, "eos": False}),
        (Example("abcde", "fg"), {"answer_only": True, "max_length": 6}),
        (Example("ab", ""), {"answer_only": True}),
    ],
)
def test_one_token_is_enough(example, options):
    (batch,) = batches(encode([example], Letters(), **options), 1, seed=0, epoch=0)
    assert batch.n_tokens == 1


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        ([], {}, "no examples"),
        ("a text", {}, "examples is one str: give a list"),
        (["ab"], {"max_length": 1}, "1 examples leave no token to learn: 1. .* raise max_length"),
        ([""] * 500, {}, r"^500 examples .*: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10…\."),
    ],
)
def test_bad_arguments_of_encode(examples, options, message):
    with pytest.raises(ValueError, match=message):
        encode(examples, Letters(), **options)


def test_many_examples_are_streamed_and_kept_compact():
    n = 100_000
    tracemalloc.start()
    data = encode(("x" * 15 for _ in range(n)), Letters())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert data.n_tokens == 16 * n
    # Lists of ids take eight bytes a token and more.
    assert peak < 1.5 * (4 * data.n_tokens + 20 * n)


def test_a_dataset_is_a_sequence():
    data = encode(["ab", "cde", "f"], Letters())
    assert len(data) == 3
    assert data[-1][0].tolist() == [ord("f"), 0]
    assert [ids.tolist() for ids, _ in data[1:]] == [ids.tolist() for ids, _ in list(data)[1:]]
    with pytest.raises(IndexError):
        data[3]
    data[0][0].zero_()
    assert data[0][0].tolist() == [ord("a"), ord("b"), 0]


# batches


def test_padding_is_masked_by_length_never_by_id():
    data = encode(["a\0b", "abcdef"], Letters())  # an end within a text is learnt like the last
    batch = collate(data, np.arange(2))
    assert batch.idx.shape == batch.labels.shape == (2, 7)
    assert batch.idx.dtype == batch.labels.dtype == torch.int64
    assert batch.labels[0].tolist() == [97, 0, 98, 0, IGNORE, IGNORE, IGNORE]
    assert torch.equal(batch.labels[1], batch.idx[1])
    assert batch.n_tokens == 3 + 6


def test_a_padded_batch_learns_the_same():
    (batch,) = batches(encode(["abc", "d"], Letters()), 2, seed=0, epoch=0)
    padded = batch.padded(3, 7)
    assert padded.idx.shape == padded.labels.shape == (3, 7)
    assert torch.equal(padded.idx[:2, :4], batch.idx)
    assert torch.equal(padded.labels[:2, :4], batch.labels)
    assert (padded.labels[2:] == IGNORE).all()
    assert (padded.labels[:, 4:] == IGNORE).all()
    assert padded.n_tokens == batch.n_tokens


def test_the_order_leaves_the_callers_random_numbers_alone():
    found = []
    for way in ({}, {"batch_size": 3}, {"tokens_per_batch": 999}):
        torch.manual_seed(0)
        np.random.seed(0)
        list(batches(encode(TEXTS, Letters()), seed=3, epoch=0, **way) if way else ())
        found.append((torch.rand(3).tolist(), np.random.rand(3).tolist()))
    assert found[0] == found[1] == found[2]


def test_a_separator_stands_between_prompt_and_completion_and_is_the_prompts(tokenizer):
    examples = [Example("a b", " c"), Example("", "d e")]
    end = tokenizer.eos
    for answer_only, ignored in ((False, 0), (True, 3)):
        data = encode(examples, tokenizer, separator=end, answer_only=answer_only)
        ids, labels = data[0]
        assert ids.tolist() == [*tokenizer.encode("a b"), end, *tokenizer.encode(" c"), end]
        assert labels.tolist() == [IGNORE] * ignored + ids.tolist()[ignored:]
        assert data[1][0].tolist() == [*tokenizer.encode("d e"), end]  # no prompt, nothing between


def test_a_dataset_shows_its_size(tokenizer):
    data = encode(["one two", "a rose is a rose"], tokenizer, max_length=4)
    assert repr(data) == "<Dataset: 2 examples, 7 tokens, the longest 4; 1 cut>"


# Datasets that nothing or not all of can be learnt from


def test_an_empty_last_example_has_a_key_of_its_own():
    data = Dataset(np.array([1, 2]), np.array([0, 2, 2]), np.zeros(3, int))
    ((first, second, last),) = data.prompt_keys()
    assert first == last != second


def test_a_fingerprint_is_of_ids_of_ends_and_of_what_is_learnt():
    ids, ends, ignored = np.arange(6), np.array([3, 6]), np.array([0, 1])
    others = (ids + 1, ends, ignored), (ids, np.array([2, 6]), ignored), (ids, ends, ignored + 1)
    assert len({Dataset(*each).fingerprint for each in ((ids, ends, ignored), *others)}) == 4


def test_a_start_below_zero_is_refused():
    with pytest.raises(ValueError, match="start must be at least 0, got -1"):
        next(batches(encode(["ab"], Letters()), 1, seed=0, epoch=0, start=-1))


@pytest.mark.parametrize("ignored", [[0, 3], [0, 9]])
def test_examples_without_a_token_to_learn_are_named(ignored):
    data = Dataset(np.arange(6), np.array([3, 6]), np.array(ignored))
    model = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=9))
    for call in (
        lambda: next(train(model, data, TrainConfig(steps=2))),
        lambda: evaluate(model, data),
    ):
        with pytest.raises(ValueError, match=r"1 examples leave no token to learn: 2\. Leave them"):
            call()
