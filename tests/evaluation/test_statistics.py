"""Intervals and tests against published figures, and against their definitions."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedgrad.evaluation.statistics import (
    Accuracy,
    McNemar,
    Spread,
    difference_interval,
    effective_number,
    mcnemar_p,
    wilson,
)
from embedgrad.util.errors import DataError


@pytest.mark.parametrize(
    ("one", "other", "low", "high"),
    [  # Newcombe 1998, table II, method 10
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((0, 10), (0, 20), -0.1611, 0.2775),
        ((10, 10), (0, 10), 0.6075, 1.0000),
    ],
)
def test_the_interval_of_a_difference_is_newcombes(
    one: tuple[int, int], other: tuple[int, int], low: float, high: float
) -> None:
    found = difference_interval(one[0] / one[1], one[1], other[0] / other[1], other[1])
    assert found == pytest.approx((low, high), abs=6e-5)


@given(st.integers(1, 400), st.data())
def test_wilsons_interval_solves_its_equation(n: int, data: st.DataObject) -> None:
    """Its ends are the true shares from which the one seen lies 1.96 standard errors away (Wilson 1927)."""
    share = data.draw(st.integers(0, n)) / n
    low, high = wilson(share, n)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(share - end) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / n), abs=1e-9)


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 5, 1.0), (1, 5, 14 / 64), (10, 0, 2 / 1024), (86, 150, 3.716e-05)],
)
def test_mcnemars_exact_p_of_known_tables(gained: int, lost: int, p: float) -> None:
    """The last one: approval of the prime minister (Agresti, Categorical Data Analysis, table 10.1), as the R package
    exact2x2 has it."""
    assert mcnemar_p(gained, lost) == pytest.approx(p, rel=2e-4)
    assert mcnemar_p(lost, gained) == mcnemar_p(gained, lost)


@given(st.integers(0, 9), st.integers(0, 9))
def test_mcnemars_p_counts_outcomes(gained: int, lost: int) -> None:
    """Of all ways in which gained + lost fair coins can fall, the share that is at least as uneven."""
    n, uneven = gained + lost, abs(gained - lost)
    if n > 12:
        return
    falls = [abs(2 * sum(coins) - n) >= uneven for coins in itertools.product((0, 1), repeat=n)]
    assert mcnemar_p(gained, lost) == pytest.approx(sum(falls) / len(falls))


def test_a_large_paired_test_neither_overflows_nor_vanishes() -> None:
    assert 0 < mcnemar_p(5000, 5500) < 1e-5
    assert mcnemar_p(100_000, 0) == 0.0  # 2^-99999 is not a float


def test_paired_counts() -> None:
    test = McNemar.of([True, False, False, True], [True, True, True, False])
    assert (test.gained, test.lost) == (2, 1)
    with pytest.raises(DataError, match="same items twice, not 1 and 2"):
        McNemar.of([True], [True, False])


def test_means_over_runs() -> None:
    assert Spread.of([1.0, 2.0, 4.0]) == Spread(7 / 3, pytest.approx(math.sqrt(7 / 3)), 3)
    assert Spread.of([0.5]) == Spread(0.5, None, 1)
    with pytest.raises(DataError):
        Spread.of([])
    with pytest.raises(DataError):
        Accuracy.of([])


def test_effective_numbers() -> None:
    assert effective_number([2.0] * 7) == pytest.approx(7)
    assert effective_number([1.0, 1e-12]) == pytest.approx(1)
    assert effective_number([1e100, 1e100]) == pytest.approx(2)
