"""A file that is written tensor by tensor is the one that the library would write."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save

from gpt2 import streaming

KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64]
SHAPES = st.lists(st.integers(0, 3), max_size=3)
FILES = st.dictionaries(st.text('ab.ü"\\', min_size=1), st.tuples(st.sampled_from(KINDS), SHAPES))


@given(FILES, st.dictionaries(st.text("xyz", min_size=1), st.text(), max_size=1))
def test_it_is_read_back_bit_for_bit(tmp_path_factory, shapes, metadata):
    file = tmp_path_factory.mktemp("f") / "file"
    tensors = {name: torch.randn(shape).to(kind) for name, (kind, shape) in shapes.items()}
    streaming.write(file, tensors, metadata)
    found = load_file(file)
    assert {*found} == {*tensors}
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(file, "pt") as opened:
        assert (opened.metadata() or {}) == metadata


def test_of_one_dtype_it_has_the_librarys_bytes(tmp_path):
    tensors = {name: torch.randn(3, 2).t() for name in ("b", "a.x", "a")}
    streaming.write(tmp_path / "file", tensors, {"format": "pt"})
    plain = {name: t.contiguous() for name, t in tensors.items()}
    assert (tmp_path / "file").read_bytes() == save(plain, {"format": "pt"})


def test_a_full_disk_is_an_error(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        streaming.write(tmp_path / "no" / "file", {"a": torch.ones(1)}, {})
