"""Projected embeddings (PEZ): Wen et al., arXiv 2302.03668, algorithm 1.

The search keeps continuous rows P [k, d]. In each step they are projected onto the nearest tokens of the vocabulary (by
cosine, as the authors' program does), loss and gradient are computed *there*, and the gradient moves P with AdamW. So
every loss is that of tokens, never of P itself.

With a fluency term, the tokens are context of their own text, which the gradient has, and targets of it. As targets
they have a gradient at the embeddings where head and table are one matrix: there each row is also pulled towards a
higher logit of its own, (fluency / targets) · h_i. With a head of its own the tokens count as context only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from embedgrad.engine.table_product import best_tokens
from embedgrad.maths.optimizer import AdamW
from embedgrad.model.packed import as_tensor
from embedgrad.search.objective import Objective
from embedgrad.search.search import Search, SearchState
from embedgrad.search.vocabulary import text_tokens

_RULE = AdamW()


class ProjectedEmbeddings(Search):
    """See the module. learning_rate: of AdamW, in multiples of the root mean square of the prompt's own embeddings.

    Embedding tables differ in scale by a factor of 50, so that an absolute rate would suit some models only.
    """

    name = "pez"

    def __init__(
        self, objective: Objective, batches: Callable[[int], Sequence[int]], seed: int, *, learning_rate: float = 0.3
    ) -> None:
        super().__init__(objective, batches, seed)
        anchor = objective.prompt.anchor
        self.rate = learning_rate * float(anchor.square().mean().sqrt())

    def begin(self) -> SearchState:
        """See `Search`."""
        state = super().begin()
        rows = self.model.embedding_rows(state.ids)
        state.tensors = {"rows": rows, "m": torch.zeros_like(rows), "v": torch.zeros_like(rows)}
        return state

    def least(self, batch: Sequence[int]) -> int:
        """See `Search`: forward and backward at the nearest tokens."""
        return 2 * self.objective.tokens(batch)

    def step(self, state: SearchState, batch: Sequence[int], left: int) -> int:
        """See `Search`."""
        loss, gradient = self.objective.gradient(state.ids, batch)
        if self.objective.fluency:
            gradient = gradient - self._as_targets(state.ids)
        state.note(state.ids, loss)
        rows, m, v = (state.tensors[name] for name in ("rows", "m", "v"))
        _RULE.move(rows, m, v, gradient.float(), _RULE.factors(state.step + 1, self.rate))
        state.ids = self.nearest(rows)
        return self.least(batch)

    def nearest(self, rows: Tensor) -> list[int]:
        """The nearest token of each row of `rows` [k, d], among those that may stand in a text."""
        found = best_tokens(self.model, rows, 1, allowed=text_tokens(self.model), cosine=True)
        return [int(id) for id in found.ids[:, 0]]

    def _as_targets(self, ids: Sequence[int]) -> Tensor:
        """The gradient of fluency · (mean logit of the tokens in their own text) at the tokens' rows of the head."""
        if self.model.weights.head.parts[0] is not as_tensor(self.model.weights.embedding):
            return torch.zeros(1)
        counted = sum(self.objective.text_frame.target_mask)
        return self.objective.next_token_rows(ids).cpu() * (self.objective.fluency / max(1, counted))
