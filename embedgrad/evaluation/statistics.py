"""Intervals and tests for shares of correct answers, and the spread of a figure over several runs.

All functions are closed forms, exact or in float64, and need no library. Sources:
E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927);
R. G. Newcombe, "Interval estimation for the difference between independent proportions: comparison of eleven methods",
Statistics in Medicine 17 (1998), method 10; Q. McNemar, "Note on the sampling error of the difference between
correlated proportions or percentages", Psychometrika 12 (1947), in its exact (binomial) form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from embedgrad.util.errors import DataError

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def in_percent(one: Any) -> str:
    """A share with its interval, such as "88.8 % [85.7, 91.3]". one has value, low and high as attributes or items."""
    value, low, high = _figures(one)
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def in_points(one: Any) -> str:
    """A difference of shares with its interval, such as "+5.5 points [+2.1, +9.0]". one: as for `in_percent`."""
    value, low, high = _figures(one)
    return f"{value:+.1f} points [{low:+.1f}, {high:+.1f}]"


def _figures(one: Any) -> list[float]:
    values = one if isinstance(one, Mapping) else vars(one)
    return [100 * values[name] for name in ("value", "low", "high")]


def wilson(share: float, n: float) -> tuple[float, float]:
    """The 95 % Wilson interval (low, high) of a share (0 to 1) of `n` items. n may be an effective number."""
    z = Z_95
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def difference_interval(one: float, n_one: float, other: float, n_other: float) -> tuple[float, float]:
    """The 95 % interval (low, high) of `one` − `other` for shares of `n_one` and `n_other` independent items.

    It is Newcombe's hybrid score interval.
    """
    (low_one, high_one), (low_other, high_other) = wilson(one, n_one), wilson(other, n_other)
    difference = one - other
    down = math.hypot(one - low_one, high_other - other)
    up = math.hypot(high_one - one, other - low_other)
    return max(-1.0, difference - down), min(1.0, difference + up)


@dataclass(frozen=True)
class Accuracy:
    """A share of correct answers with its 95 % Wilson interval: `correct` of `total` items."""

    value: float
    low: float
    high: float
    correct: int
    total: int

    @classmethod
    def of(cls, correct: Sequence[bool]) -> Accuracy:
        """The share of True. Raises DataError for an empty sequence."""
        n, k = len(correct), sum(correct)
        if not n:
            raise DataError("a share needs at least one item.")
        return cls(k / n, *wilson(k / n, n), k, n)


@dataclass(frozen=True)
class McNemar:
    """A paired test of before against after on the same items.

    gained: items that were wrong before and are right after. lost: the reverse. p: McNemar's exact two-sided p-value,
    which is the probability of a split at least as uneven if each of the gained + lost items were as likely gained as
    lost; 1 if there are no such items.
    """

    gained: int
    lost: int
    p: float

    @classmethod
    def of(cls, before: Sequence[bool], after: Sequence[bool]) -> McNemar:
        """The test of two sequences over the same items. Raises DataError where their lengths differ."""
        if len(before) != len(after):
            raise DataError(f"a paired test needs the same items twice, not {len(before)} and {len(after)}.")
        gained = sum(new and not old for old, new in zip(before, after, strict=True))
        lost = sum(old and not new for old, new in zip(before, after, strict=True))
        return cls(gained, lost, mcnemar_p(gained, lost))


def mcnemar_p(gained: int, lost: int) -> float:
    """min(1, 2 Σ_{i ≤ min(gained, lost)} C(n, i) / 2^n) with n = gained + lost, in exact integers until the end."""
    n = gained + lost
    term = tail = 1
    for i in range(min(gained, lost)):
        term = term * (n - i) // (i + 1)
        tail += term
    return float(min(Fraction(1), Fraction(2 * tail, 2**n)))


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (divisor n − 1) of a figure over n runs. deviation: None for one run."""

    mean: float
    deviation: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of `values`. Raises DataError without values."""
        n = len(values)
        if not n:
            raise DataError("a mean needs at least one value.")
        mean = math.fsum(values) / n
        squares = math.fsum((value - mean) ** 2 for value in values)
        return cls(mean, math.sqrt(squares / (n - 1)) if n > 1 else None, n)


def effective_number(weights: Sequence[float]) -> float:
    """Effective sample size of weighted items, (Σ w)² / Σ w² (Kish, "Survey Sampling", 1965)."""
    largest = max(weights)
    shares = [weight / largest for weight in weights]  # the squares of the weights could overflow
    return math.fsum(shares) ** 2 / math.fsum(share * share for share in shares)
