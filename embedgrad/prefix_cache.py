"""Keys and values of tokens that stand before the prompt, computed once and used at every step.

A kept unit (the template's constant part; a question, where the prompt follows it) is always computed by itself, behind
its parent unit only, so that its bits depend neither on the batch in which it first appeared nor on a resumed run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from embedgrad.memory import StepSize, activation_bytes
from embedgrad.model.step import build_step
from embedgrad.tree import KeptUnit, TokenTree

if TYPE_CHECKING:
    from embedgrad.model.model import Model

Path = tuple[tuple[int, ...], ...]
NOTHING = torch.empty(0, dtype=torch.int64)


class PrefixCache:
    """Keys and values [L, 2, n, G, D] by the unit's path.

    Between steps at most `budget` bytes stay; when a step leaves more, the cache is emptied, because a data set that is
    larger than the budget would be visited in an order that no partial cache serves.
    """

    def __init__(self, budget: int = 1 << 30) -> None:
        self.budget = budget
        self._stored: dict[Path, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(unit.nbytes for unit in self._stored.values())

    def clear(self) -> None:
        """Forget everything."""
        self._stored.clear()

    def units(self, model: Model, units: Sequence[KeptUnit]) -> tuple[Tensor, ...]:
        """Keys and values of `units`, in order; parents stand before their children. Uses the model's arena."""
        if self.nbytes > self.budget:
            self.clear()
        for unit in units:
            if unit.path not in self._stored:
                self._stored[unit.path] = self._compute(model, unit)
        return tuple(self._stored[unit.path] for unit in units)

    def _compute(self, model: Model, unit: KeptUnit) -> Tensor:
        parents = tuple(self._stored[unit.path[: i + 1]] for i in range(len(unit.path) - 1))
        return keys_and_values(model, unit.ids, unit.path[:-1], parents)


def keys_and_values(
    model: Model,
    ids: Sequence[int],
    before: Path,
    kept: tuple[Tensor, ...],
    prompt: Tensor | None = None,
    prompt_rows: Sequence[int] | None = None,
) -> Tensor:
    """Keys and values [L, 2, n, G, D] of the n tokens `ids`, behind the units `before` with keys and values `kept`."""
    config, n = model.config, len(ids)
    out = torch.empty(
        config.num_layers, 2, n, config.num_kv_heads, config.head_dim, dtype=model.dtype, device=model.device
    )
    if not n:  # queries that share not even their first token
        return out
    units = tuple(KeptUnit(before[: i + 1], 0, n) for i in range(len(before)))
    start = sum(len(unit.ids) for unit in units)
    rows = torch.full((n,), -1) if prompt_rows is None else torch.tensor(prompt_rows, dtype=torch.int64)
    tree = TokenTree(
        ids=torch.tensor(ids, dtype=torch.int64),
        prompt_rows=rows,
        positions=torch.arange(start, start + n),
        key_end=torch.full((n,), n, dtype=torch.int32),
        units=units,
        predicting=NOTHING,
        target_slot=NOTHING,
        target_ids=NOTHING,
        target_example=NOTHING,
        target_weights=NOTHING.double(),
        leaves=torch.tensor([n - 1]),
    )
    step = build_step(config, tree, kept, model.dtype, model.device, rows=NOTHING)

    def take(layer: int, k: Tensor, v: Tensor) -> None:
        out[layer, 0], out[layer, 1] = k, v

    size = StepSize(n, step.num_kept, 0, None, 0)
    model.arena.begin(activation_bytes(config, size, model.dtype, None, model.ops))
    embeddings = model.no_prompt if prompt is None else prompt
    model.decoder.keys_and_values(embeddings, step, take)
    return out
