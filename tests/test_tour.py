"""docs/tour.ipynb runs from top to bottom, and what it shows is what a run of it shows."""

from __future__ import annotations

import json
import re

import pytest
import tour


@pytest.fixture(scope="module")
def notebook():
    return json.loads(tour.NOTEBOOK.read_text())


@pytest.fixture(scope="module")
def ran(notebook):
    return tour.run(notebook)


def test_the_model_learns_what_the_tour_says(ran):
    names = ran[1]
    learnt = {text.partition("\nA:")[2].strip() for text in names["texts"]}
    assert sum(answer in learnt for answer in names["tuned"]) >= 3
    assert not set(names["base"]) & learnt
    assert names["losses"][-1] < 0.3 < 2 < names["losses"][0]
    assert names["routed"][0] == "A rose is a rose is a rose."
    assert names["left"] == 0
    assert names["merged"] == names["tuned"]


def test_what_it_keeps_is_what_it_shows(notebook, ran):
    """Cells that machines' rounding can change are marked, and keep outputs of the same kinds."""
    certain = 0
    for cell, outputs in zip(tour.code_cells(notebook), ran[0], strict=True):
        if "varies" in cell["metadata"].get("tags", ()):
            kinds = [
                [set(o.get("data", {"text": 0})) for o in got] for got in (cell["outputs"], outputs)
            ]
            assert kinds[0] == kinds[1]
        else:
            assert cell["outputs"] == outputs
            certain += 1
    assert certain >= 5


def test_what_it_keeps_knows_no_machine_and_no_clock(notebook):
    kept = json.dumps([cell["outputs"] for cell in tour.code_cells(notebook)])
    assert all(cell["outputs"] for cell in tour.code_cells(notebook))
    assert not re.search(r"/home|/tmp|/root|/Users|\.venv|Warning|Traceback|\\u001b", kept)
    assert not re.search(r"\d+:\d\d|\d ?(s|ms|seconds)\b", kept)
    assert len(kept) < 60_000


def test_the_file_is_a_notebook(notebook):
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    numbers = [cell["execution_count"] for cell in tour.code_cells(notebook)]
    assert numbers == list(range(1, len(numbers) + 1))
