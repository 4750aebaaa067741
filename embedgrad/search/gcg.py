"""Greedy coordinate gradient: Zou et al., arXiv 2307.15043, algorithm 1, for a prompt that is wanted to be useful.

In each step, the gradient at the embeddings of the present tokens proposes for each place i the tokens v with the
largest −g_i · E_v, the first-order decrease of the loss. `candidates` single swaps are drawn from them, evenly over
places and proposals. All are scored exactly, in one packed pass on the same examples, and the best one is taken.

Ours, and not the paper's: a swap is only taken where it lowers the loss of the present tokens on these examples; each
step has a batch of its own; swaps whose text would be tokenised otherwise are not drawn; with a fluency term the tokens
count as targets of their own text too, whose first-order change is that of a logit, (fluency / targets) · h_i · H_v, in
the same product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from embedgrad.engine.table_product import best_tokens
from embedgrad.search.objective import Objective
from embedgrad.search.search import Search, SearchState
from embedgrad.search.vocabulary import text_of, text_tokens

_TRIES = 8  # draws for each candidate that is wanted


class GreedyCoordinate(Search):
    """See the module. candidates: swaps scored in a step. proposals: tokens proposed for each place."""

    name = "gcg"

    def __init__(
        self, objective: Objective, batches: Callable[[int], Sequence[int]], seed: int, *, candidates: int = 32,
        proposals: int = 64,
    ) -> None:  # fmt: skip
        super().__init__(objective, batches, seed)
        self.candidates, self.proposals = candidates, proposals

    def least(self, batch: Sequence[int]) -> int:
        """See `Search`: the gradient, and one candidate."""
        return 3 * self.objective.tokens(batch)

    def step(self, state: SearchState, batch: Sequence[int], left: int) -> int:
        """See `Search`. A step that the budget cuts short has fewer candidates."""
        objective, each = self.objective, self.objective.tokens(batch)
        loss, gradient = objective.gradient(state.ids, batch)
        swaps = self._draw(state, self.proposed(state.ids, gradient), min(self.candidates, left // each - 2))
        state.note(state.ids, loss)
        if not swaps:
            return 2 * each
        scored = objective.losses(swaps, batch)
        total = scored.task + objective.fluency * scored.nll
        best = int(total.argmin())
        if float(total[best]) < loss:
            state.ids = swaps[best]
            state.note(state.ids, float(total[best]))
        return (2 + len(swaps)) * each

    def proposed(self, ids: Sequence[int], gradient: Tensor) -> list[list[int]]:
        """For each place the tokens that may take it, the most promising first, without the present one.

        gradient [k, d]: that of the loss at the places' embeddings.
        """
        head_rows = None
        if self.objective.fluency:
            counted = sum(self.objective.text_frame.target_mask)
            head_rows = self.objective.next_token_rows(ids) * (self.objective.fluency / counted)
        best = best_tokens(
            self.model, -gradient, self.proposals + 1, allowed=text_tokens(self.model), head_rows=head_rows
        )
        return [[v for v in row if v != own][: self.proposals] for row, own in zip(best.ids.tolist(), ids, strict=True)]

    def _draw(self, state: SearchState, proposed: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """`count` different prompts that differ from the present one in one place and are texts, or fewer."""
        draw = self.random(state.step)
        found: dict[tuple[int, ...], None] = {}
        seen: set[tuple[int, int]] = set()
        places = [place for place, tokens in enumerate(proposed) if tokens]
        for _ in range(_TRIES * count):
            if len(found) == count or not places:
                break
            place = draw.choice(places)
            token = draw.choice(proposed[place])
            if (place, token) in seen:
                continue
            seen.add((place, token))
            ids = [*state.ids[:place], token, *state.ids[place + 1 :]]
            if text_of(self.model, self.objective.prompt.template, ids) is not None:
                found[tuple(ids)] = None
        return [list(ids) for ids in found]
