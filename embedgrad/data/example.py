"""One example: a query and the answer that the model should give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from embedgrad.util.errors import DataError

LARGEST_WEIGHT = 1e100  # sums of any number of weights stay finite


@dataclass(frozen=True)
class Example:
    """A query and its target. Each is text, or token ids that are used unchanged.

    weight: the weight of this example in the mean loss, from 0 to 1e100. Raises DataError for any other weight.
    where: the place that it was read from, such as "train.jsonl, line 3", for messages; it tells no examples apart.
    """

    query: str | Sequence[int]
    target: str | Sequence[int]
    weight: float = 1.0
    where: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)):
            raise DataError(f"an example's weight must be a number, not {type(self.weight).__name__}.")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise DataError(f"an example's weight must be finite and not negative, not {self.weight}.")
        if self.weight > LARGEST_WEIGHT:
            raise DataError(f"an example's weight must be at most {LARGEST_WEIGHT}, not {self.weight}.")


def check_examples(examples: object, what: str) -> None:
    """Raises DataError unless `examples` is a sequence of `Example`. `what` names the sequence in the message."""
    if isinstance(examples, (str, bytes)) or not isinstance(examples, Sequence):
        raise DataError(f"{what} must be a list of embedgrad.Example, not {type(examples).__name__}.")
    for i, example in enumerate(examples):
        if not isinstance(example, Example):
            raise DataError(
                f"{what} must hold embedgrad.Example only, but number {i} is of type {type(example).__name__}."
            )
