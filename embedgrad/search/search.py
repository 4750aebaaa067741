"""What both discrete searches have in common: a state that can be saved, and a budget of tokens that is never exceeded.

A search is a function from state to state. Its random choices depend on the seed and the step's number alone, so that
a search that was stopped goes on to the same result.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from embedgrad.engine.model import Model
from embedgrad.search.objective import Objective
from embedgrad.search.vocabulary import text_of

VISITED = 64  # prompts of which a state remembers the loss; the worst are forgotten first


@dataclass
class SearchState:
    """Where a search stands.

    ids: the present tokens. step, spent: steps done and tokens spent (see `search.objective`), `backward` of them in
    backward passes. visited: prompts with their loss {ids, loss, step}; losses of different batches are compared, so
    they are only a hint. tensors: what else the search needs.
    """

    ids: list[int]
    step: int = 0
    spent: int = 0
    backward: int = 0
    visited: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def note(self, ids: Sequence[int], loss: float) -> None:
        """Remembers the loss of a prompt; of two losses of one prompt, the later."""
        kept = [one for one in self.visited if one["ids"] != list(ids)]
        kept.append({"ids": list(ids), "loss": loss, "step": self.step})
        self.visited = sorted(kept, key=lambda one: one["loss"])[:VISITED]

    def to_json(self) -> dict[str, Any]:
        """All but the tensors."""
        return {name: getattr(self, name) for name in ("ids", "step", "spent", "backward", "visited")}

    @classmethod
    def of(cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SearchState:
        """The state that `to_json` gave, with its tensors."""
        return cls(tensors=dict(tensors), **values)


class Search(ABC):
    """A discrete search for a prompt with a small `Objective`, from the objective's prompt.

    batches: batches(step) gives the indices of the examples of a step.
    """

    name: str

    def __init__(self, objective: Objective, batches: Callable[[int], Sequence[int]], seed: int) -> None:
        self.objective, self.seed = objective, seed
        self.batches = batches

    @property
    def model(self) -> Model:
        """The model of the objective."""
        return self.objective.model

    def begin(self) -> SearchState:
        """The state before the first step."""
        return SearchState(list(self.objective.prompt.token_ids))

    def advance(self, state: SearchState, budget: int) -> bool:
        """One more step, in place. False, and nothing done, where no step fits into `budget` tokens any more."""
        batch = self.batches(state.step)
        left = budget - state.spent
        if left < self.least(batch):
            return False
        state.spent += self.step(state, batch, left)
        state.backward += self.objective.tokens(batch)  # one gradient a step
        state.step += 1
        return True

    @abstractmethod
    def least(self, batch: Sequence[int]) -> int:
        """Tokens that the smallest possible step on these examples costs."""

    @abstractmethod
    def step(self, state: SearchState, batch: Sequence[int], left: int) -> int:
        """One step in place, for at most `left` tokens, which are enough for the smallest. Returns the tokens spent."""

    def random(self, step: int) -> random.Random:
        """The random numbers of a step."""
        return random.Random(f"{self.seed}/{self.name}/{step}")

    def texts(self, state: SearchState, count: int) -> list[str]:
        """At most `count` different texts to try on validation data: the present one, then those with the lowest loss.

        Tokens that are not those of any text give the text that they spell.
        """
        found: dict[str, None] = {}
        for ids in (state.ids, *(one["ids"] for one in state.visited)):
            text = text_of(self.model, self.objective.prompt.template, ids)
            text = self.model.tokenizer.decode(list(ids), skip_special=True).strip() if text is None else text
            if text:
                found[text] = None
        return list(found)[:count]
