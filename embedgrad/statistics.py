"""Intervals and tests for shares of correct answers, and figures over several runs.

Everything here is a closed form over a few integers, exact or in float64, so that it needs no library:
E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927);
R. G. Newcombe, "Interval estimation for the difference between independent proportions: comparison of eleven methods",
Statistics in Medicine 17 (1998), method 10; Q. McNemar, "Note on the sampling error of the difference between
correlated proportions or percentages", Psychometrika 12 (1947), in its exact (binomial) form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from embedgrad.errors import DataError

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def wilson(share: float, n: float) -> tuple[float, float]:
    """The 95 % Wilson interval of a share (0 to 1) that was seen on `n` items; n may be an effective number."""
    z = Z_95
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def difference_interval(one: float, n_one: float, other: float, n_other: float) -> tuple[float, float]:
    """The 95 % interval of `one` − `other`, two shares of independent items (Newcombe's hybrid score interval)."""
    (low_one, high_one), (low_other, high_other) = wilson(one, n_one), wilson(other, n_other)
    difference = one - other
    down = math.hypot(one - low_one, high_other - other)
    up = math.hypot(high_one - one, other - low_other)
    return max(-1.0, difference - down), min(1.0, difference + up)


@dataclass(frozen=True)
class Accuracy:
    """A share of correct answers with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    correct: int
    total: int

    @classmethod
    def of(cls, correct: Sequence[bool]) -> Accuracy:
        """The share of True. Raises DataError where there is nothing to count."""
        n, k = len(correct), sum(correct)
        if not n:
            raise DataError("a share needs at least one item.")
        return cls(k / n, *wilson(k / n, n), k, n)


@dataclass(frozen=True)
class McNemar:
    """Before against after on the same items.

    gained: wrong before, right after; lost: the other way round. p: McNemar's exact two-sided p-value, the probability
    of a split at least as uneven among the gained + lost items if each were as likely gained as lost; 1 without any.
    """

    gained: int
    lost: int
    p: float

    @classmethod
    def of(cls, before: Sequence[bool], after: Sequence[bool]) -> McNemar:
        """Raises DataError where the two are not of one length."""
        if len(before) != len(after):
            raise DataError(f"a paired test needs the same items twice, not {len(before)} and {len(after)}.")
        gained = sum(new and not old for old, new in zip(before, after, strict=True))
        lost = sum(old and not new for old, new in zip(before, after, strict=True))
        return cls(gained, lost, mcnemar_p(gained, lost))


def mcnemar_p(gained: int, lost: int) -> float:
    """min(1, 2 Σ_{i ≤ min(gained, lost)} C(n, i) / 2^n) with n = gained + lost, in whole numbers until the end."""
    n = gained + lost
    term = tail = 1
    for i in range(min(gained, lost)):
        term = term * (n - i) // (i + 1)
        tail += term
    return float(min(Fraction(1), Fraction(2 * tail, 2**n)))


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n − 1) of a figure over several runs; no deviation for one run."""

    mean: float
    deviation: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises DataError for no values."""
        n = len(values)
        if not n:
            raise DataError("a mean needs at least one value.")
        mean = math.fsum(values) / n
        squares = math.fsum((value - mean) ** 2 for value in values)
        return cls(mean, math.sqrt(squares / (n - 1)) if n > 1 else None, n)


def effective_number(weights: Sequence[float]) -> float:
    """(Σ w)² / Σ w²: how many equally weighted items say as much (Kish, "Survey Sampling", 1965)."""
    largest = max(weights)
    shares = [weight / largest for weight in weights]  # squares of weights could overflow
    return math.fsum(shares) ** 2 / math.fsum(share * share for share in shares)
