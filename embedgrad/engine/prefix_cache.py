"""Keys and values of what sequences share, computed once and used again.

`PrefixCache` has those of tokens that stand before the prompt, for training steps. A unit of the prefix (the template's
constant part; a question, where the prompt follows it) is always computed by itself, behind its parent unit only, so
that its bits depend neither on the batch in which it first appeared nor on a resumed run. `LastPrefix` has those of the
last generation's shared beginning, prompt included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedgrad.engine.decoder import Decoder
from embedgrad.engine.memory import activation_bytes
from embedgrad.engine.packed_pass import PrefixPass, build_pass
from embedgrad.engine.tree import PrefixUnit, TokenTree
from embedgrad.prompt.rendering import Rendered

Path = tuple[tuple[int, ...], ...]
NONE = torch.empty(0, dtype=torch.int64)


class PrefixCache:
    """Keys and values [L, 2, n, G, D] by the unit's path.

    Between steps at most `budget` bytes stay; when a step leaves more, the cache is emptied, because a data set that is
    larger than the budget would be visited in an order that no partial cache serves.
    """

    def __init__(self, decoder: Decoder, budget: int = 1 << 30) -> None:
        self.budget = budget
        self._decoder = decoder
        self._stored: dict[Path, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(unit.nbytes for unit in self._stored.values())

    def clear(self) -> None:
        """Forget everything."""
        self._stored.clear()

    def units(self, units: Sequence[PrefixUnit]) -> tuple[Tensor, ...]:
        """Keys and values of `units`, in order; parents stand before their children. Uses the decoder's arena."""
        if self.nbytes > self.budget:
            self.clear()
        for unit in units:
            if unit.path not in self._stored:
                parents = tuple(self._stored[unit.path[: i + 1]] for i in range(len(unit.path) - 1))
                self._stored[unit.path] = keys_and_values(self._decoder, unit.ids, unit.path[:-1], parents)
        return tuple(self._stored[unit.path] for unit in units)


class LastPrefix:
    """The last shared beginning: generations behind the same prompt compute only what is new in theirs."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._rows: list[int] = []
        self._embeddings = torch.empty(0)
        self._keys: Tensor | None = None

    def clear(self) -> None:
        """Forget it."""
        self._keys = None

    def get(self, embeddings: Tensor, sequence: Rendered, length: int) -> Tensor | None:
        """Keys and values [L, 2, n, G, D] of the first n ≤ `length` tokens of `sequence`, or None for n = 0."""
        if self._keys is None or not torch.equal(embeddings, self._embeddings):
            return None
        same = 0
        while same < min(length, len(self._ids)) and (
            (sequence.ids[same], sequence.prompt_rows[same]) == (self._ids[same], self._rows[same])
        ):
            same += 1
        return self._keys[:, :, :same] if same else None

    def put(self, embeddings: Tensor, sequence: Rendered, length: int, keys: Tensor) -> None:
        """Remember the keys and values of the first `length` tokens of `sequence`."""
        self._ids, self._rows = sequence.ids[:length], sequence.prompt_rows[:length]
        self._embeddings, self._keys = embeddings.clone(), keys


def keys_and_values(
    decoder: Decoder,
    ids: Sequence[int],
    before: Path,
    prefix: tuple[Tensor, ...],
    prompt: Tensor | None = None,
    prompt_rows: Sequence[int] | None = None,
) -> Tensor:
    """Keys and values [L, 2, n, G, D] of the n tokens `ids`, behind the units `before`, whose own are `prefix`."""
    config, n, device = decoder.config, len(ids), decoder.arena.device
    out = torch.empty(config.num_layers, 2, n, config.num_kv_heads, config.head_dim, dtype=decoder.dtype, device=device)
    if not n:  # queries that share not even their first token
        return out
    units = tuple(PrefixUnit(before[: i + 1], 0, n) for i in range(len(before)))
    start = sum(len(unit.ids) for unit in units)
    tree = TokenTree.without_targets(
        ids=torch.tensor(ids, dtype=torch.int64),
        prompt_rows=torch.full((n,), -1) if prompt_rows is None else torch.tensor(prompt_rows, dtype=torch.int64),
        positions=torch.arange(start, start + n),
        key_end=torch.full((n,), n, dtype=torch.int32),
        units=units,
        leaves=torch.tensor([n - 1]),
    )
    p = build_pass(config, tree, prefix, decoder.ops, decoder.dtype, device, rows=NONE, prompt_only=False)
    p = PrefixPass.keeping(p, out)
    decoder.arena.begin(activation_bytes(config, p.size, decoder.dtype, None, decoder.ops))
    decoder.keys_and_values(decoder.no_prompt if prompt is None else prompt, p)
    return out
