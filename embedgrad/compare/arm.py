"""An arm of a comparison: its starting prompts, and what happens to them before the test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from embedgrad.data.example import Example
from embedgrad.engine.model import Model
from embedgrad.maths.trust_region import TrustRegion
from embedgrad.prompt.prompt import SoftPrompt

Candidates = Callable[[Model, Sequence[Example], int], list[SoftPrompt]]
"""A function (model, training examples, seed) → prompts, in the order in which they are tried."""


@dataclass(frozen=True)
class Training:
    """How an arm is optimised.

    region, learning_rate: replace the configuration's; None: the configuration's.
    shuffled: the targets are permuted among the training examples and among the validation examples, so that only their
        format can be learnt.
    peft: PEFT's prompt tuning instead of our optimisation.
    """

    region: TrustRegion | None = None
    learning_rate: float | None = None
    shuffled: bool = False
    peft: bool = False


@dataclass(frozen=True)
class Arm:
    """An arm of a comparison.

    name: name of its folder. title: title for people.
    candidates: gives the prompts. Without training there may be several: they are tried in their order on the
        validation data until the budget is used up, and the best one is tested. With training there is one.
    training: how the prompt is optimised; None: not at all.
    search: the discrete search that is made from the one prompt, one of `embedgrad.search.plan.NAMES`; None: none.
    repeated: run the arm with every seed; otherwise with the first seed only.
    """

    name: str
    title: str
    candidates: Candidates
    training: Training | None = None
    repeated: bool = False
    search: str | None = None


def only(make: Callable[[Model], SoftPrompt]) -> Candidates:
    """Candidates that consist of the one prompt that `make` gives."""
    return lambda model, train, seed: [make(model)]
