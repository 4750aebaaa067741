"""What an arm of a comparison is: starting prompts, and what is done with them before the test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from embedgrad.example import Example
from embedgrad.model.model import Model
from embedgrad.prompt import SoftPrompt
from embedgrad.trust_region import TrustRegion

Candidates = Callable[[Model, Sequence[Example], int], list[SoftPrompt]]
"""(model, training examples, seed) → prompts in the order in which they are tried."""


@dataclass(frozen=True)
class Training:
    """How an arm is optimised.

    region, learning_rate: instead of the configuration's. shuffled: targets are permuted among the training
    examples, and among the validation examples, so that only their format can be learnt. peft: by PEFT's prompt
    tuning, its own way.
    """

    region: TrustRegion | None = None
    learning_rate: float | None = None
    shuffled: bool = False
    peft: bool = False


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    name: of its folder. title: for people. candidates: prompts; of several the best on the validation data is tested,
    tried in their order as long as the budget lasts. training: None where nothing is optimised (then there may be many
    candidates, else there is one). repeated: whether every seed is run, or only the first.
    """

    name: str
    title: str
    candidates: Candidates
    training: Training | None = None
    repeated: bool = False


def only(make: Callable[[Model], SoftPrompt]) -> Candidates:
    """The one prompt that `make` gives."""
    return lambda model, train, seed: [make(model)]
