"""Bootstrap intervals: the figures themselves, what they hold, and a share of nothing."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.evaluation.paired import gain, surviving_share

VERDICTS = st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=60)


@given(VERDICTS)
@settings(deadline=None, max_examples=30)
def test_a_gain_is_the_difference_and_lies_in_its_interval(items: list[tuple[bool, bool, bool]]) -> None:
    before, after, _ = zip(*items, strict=True)
    found = gain(before, after)
    assert found.value == pytest.approx((sum(after) - sum(before)) / len(items))
    assert found.low - 1e-9 <= found.value <= found.high + 1e-9
    assert gain(after, before).value == -found.value


@given(VERDICTS)
@settings(deadline=None, max_examples=30)
def test_a_share_is_given_only_of_a_gain_that_is_there(items: list[tuple[bool, bool, bool]]) -> None:
    before, best, other = zip(*items, strict=True)
    share = surviving_share(before, best, other)
    assert (share is None) == (gain(before, best).low <= 0)
    if share is not None:
        assert share.value == pytest.approx((sum(other) - sum(before)) / (sum(best) - sum(before)))


def test_the_ends_of_the_scale_are_exact() -> None:
    before, best = [False] * 40, [True] * 30 + [False] * 10
    assert surviving_share(before, best, best) == surviving_share(before, best, best)
    whole, nothing = surviving_share(before, best, best), surviving_share(before, best, before)
    assert whole is not None
    assert nothing is not None
    assert (whole.value, whole.low, whole.high) == (1, 1, 1)
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draw, covered = random.Random(0), 0
    for _ in range(200):
        before = [draw.random() < 0.4 for _ in range(100)]
        after = [draw.random() < 0.6 for _ in range(100)]
        found = gain(before, after)
        covered += found.low <= 0.2 <= found.high
    assert 180 <= covered <= 199
