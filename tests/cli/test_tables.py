"""Tables for the terminal: figures stay on one line, and nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.cli.tables import tables

COMPARISON = [
    ("", ["the original text", "optimised", "original in the user's turn, first"]),
    ("seeds", ["1", "3", "1"]),
    ("answer as generated", ["2.6 % [1.5, 4.4]", "88.8 % ± 1.1 [85.7, 91.3]", "0.0 % [0.0, 0.1]"]),
    ("against the original", ["", "+440 −12, p = 1.2e-110", "+4 −1, p = 0.38"]),
    ("likeliest label", ["67.8 % [63.6, 71.7]", "88.8 % ± 1.1 [85.7, 91.3]", "0.0 % [0.0, 0.1]"]),
    ("invalid", ["90.0%", "0.0%", "0.0%"]),
]


@pytest.mark.parametrize("width", [60, 80, 100, 250])
def test_a_comparison(width: int) -> None:
    lines = tables(COMPARISON, width).splitlines()
    assert max(map(len, lines)) <= width
    for _, cells in COMPARISON[1:]:
        for cell in cells:
            assert any(cell in line for line in lines)
    assert len([line for line in lines if "─" in line]) == {60: 3, 80: 2, 100: 2, 250: 1}[width]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_figure_stands_whole(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 4))
    cells = st.lists(st.text("0123456789.%", min_size=0, max_size=25), min_size=rows, max_size=rows)
    headings = st.text("abc ", min_size=1, max_size=20)
    titles = data.draw(st.lists(st.text("abcde ", min_size=1, max_size=50), min_size=rows, max_size=rows))
    figures = data.draw(st.lists(st.tuples(headings, cells), min_size=1, max_size=7))
    lines = tables([("", titles), *figures], 80).splitlines()
    assert max(map(len, lines)) <= 80
    for _, column in figures:
        assert all(any(cell.strip() in line for line in lines) for cell in column)
