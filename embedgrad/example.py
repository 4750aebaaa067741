"""One training example: what is asked, and what the model should answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from embedgrad.errors import DataError


@dataclass(frozen=True)
class Example:
    """A query and its target, each as text or as token ids that are taken as they are.

    weight: this example's share in the mean loss, relative to the others; finite and not negative (else DataError).
    """

    query: str | Sequence[int]
    target: str | Sequence[int]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)):
            raise DataError(f"an example's weight must be a number, not {type(self.weight).__name__}.")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise DataError(f"an example's weight must be finite and not negative, not {self.weight}.")
