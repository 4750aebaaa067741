"""What the last generation's queries had in common: its keys and values serve the next call behind the same prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from embedgrad.rendering import Rendered


class ContextCache:
    """The last shared context: calls behind the same prompt compute only what is new in theirs."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._rows: list[int] = []
        self._embeddings = torch.empty(0)
        self._kept: Tensor | None = None

    def clear(self) -> None:
        """Forget it."""
        self._kept = None

    def get(self, embeddings: Tensor, sequence: Rendered, length: int) -> Tensor | None:
        """Keys and values [L, 2, n, G, D] of the first n ≤ `length` tokens of `sequence`, or None for n = 0."""
        if self._kept is None or not torch.equal(embeddings, self._embeddings):
            return None
        pairs = zip(self._ids, self._rows, sequence.ids[:length], sequence.prompt_rows[:length], strict=False)
        same = next((n for n, (a, b, c, d) in enumerate(pairs) if (a, b) != (c, d)), min(len(self._ids), length))
        return self._kept[:, :, :same] if same else None

    def put(self, embeddings: Tensor, sequence: Rendered, length: int, kept: Tensor) -> None:
        """Remember the first `length` tokens."""
        self._ids, self._rows = sequence.ids[:length], sequence.prompt_rows[:length]
        self._embeddings, self._kept = embeddings.clone(), kept
