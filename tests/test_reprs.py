"""What a notebook shows of a dataset, a count and a merge: short, and text stays text."""

from __future__ import annotations

import numpy as np
from toys import MLP

import gpt2
import lora
from lora.rounding import Agreement, Rounding

EVIL = "</script><img src=x onerror=alert(1)>"


def test_a_dataset_says_its_size():
    tokenizer = gpt2.Tokenizer()
    data = gpt2.encode(["one two", "a rose is a rose"], tokenizer, max_length=4)
    assert repr(data) == "<Dataset: 2 examples, 7 tokens, the longest 4; 1 cut>"
    nothing = data.only(np.zeros(0, np.int64))
    assert repr(nothing) == "<Dataset: no examples>"


def test_a_count_is_a_small_table():
    shown = lora.ParameterCount(trainable=294_912, total=124_734_720)._repr_html_()
    assert "294,912" in shown
    assert "124,734,720" in shown
    assert "0.2364" in shown
    assert shown.count("<tr>") == 3


def test_a_merge_is_short_however_many_layers():
    layers = {f"h.{i}{EVIL}": Rounding(i * 1e-9, 1e-10, 1e-6) for i in range(500)}
    report = lora.MergeReport(layers, Agreement(2e-6, 1e-12, 1, 64))
    line = "500 layers merged; largest error 5e-07 (bound 1e-06); logits differ by 2e-06"
    assert str(report) == f"{line}; likeliest tokens changed 1 of 64"
    assert repr(report) == f"<MergeReport: {report}>"
    shown = report._repr_html_()
    assert len(shown) < 800
    assert "h.499" in shown
    assert "1 of 64" in shown
    assert "<img" not in shown
    assert "&lt;img" in shown
    assert "script>" not in shown.replace("&gt;", "")


def test_a_merge_of_nothing_and_a_real_one():
    assert str(lora.MergeReport({}, None)) == "no layer merged"
    assert "no layer" in lora.MergeReport({}, None)._repr_html_()
    model = MLP()
    lora.inject(model, r=2, targets=("up", "down"), seed=0)
    assert "layers merged" in repr(lora.merge(model))
