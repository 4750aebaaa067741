"""Intervals of figures that compare prompts on the same items, by the bootstrap over items.

B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979), with percentile intervals.
The draws have a fixed seed, so that the same verdicts give the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; all are shares, or shares of a share."""

    value: float
    low: float
    high: float


def gain(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """The difference of two shares of right answers, `after` − `before`, on the same items in the same order.

    An item's verdict is True or False, or the share of several runs that were right.
    """
    difference = _array(after) - _array(before)
    return Estimate(float(difference.mean()), *_interval(_drawn(len(difference), difference).mean(axis=1)))


def surviving_share(before: Sequence[bool], best: Sequence[bool], other: Sequence[bool]) -> Estimate | None:
    """Which share of the gain from `before` to `best` the prompt `other` has: (other − before) / (best − before).

    Negative where it is worse than `before`, above 1 where it is better than `best`. None where the gain itself is not
    known to be positive (its interval holds 0): a share of nothing means nothing.
    """
    whole = gain(before, best)
    if whole.low <= 0:
        return None
    base, top, own = _array(before), _array(best), _array(other)
    both = _drawn(len(base), np.stack([own - base, top - base], axis=1)).mean(axis=1)  # [draws, 2]
    usable = both[both[:, 1] > 0]
    return Estimate(float((own - base).mean() / whole.value), *_interval(usable[:, 0] / usable[:, 1]))


def _array(verdicts: Sequence[float]) -> np.ndarray:
    return np.asarray(verdicts, np.float64)


def _drawn(items: int, values: np.ndarray) -> np.ndarray:
    """DRAWS resamples of the items' values."""
    return values[np.random.default_rng(0).integers(0, items, (DRAWS, items))]


def _interval(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)
