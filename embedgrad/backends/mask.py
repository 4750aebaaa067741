"""Which query of a packed pass sees which key: one interval a key, and a window where the model has one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

Plan = TypeVar("Plan")
Move = Callable[[Tensor], Tensor]


@runtime_checkable
class Movable(Protocol):
    """A backend's work list that can be made on the host and then brought to the device."""

    def moved(self, move: Move) -> Any:
        """The same list with `move` of every tensor, in a fixed order."""


@dataclass(frozen=True)
class TreeMask:
    """Which query sees which key.

    key_begin, key_end [S] int32: key j is visible to tree index i iff `key_begin[j] <= i < key_end[j]`.
    query_index [Nq] int32, ascending: tree index of each query row. prefix: how many keys in front are not the tree's
    own. With a sliding `window`, a key is visible only if `query_position - key_position < window` as well.
    """

    key_begin: Tensor
    key_end: Tensor
    query_index: Tensor
    prefix: int = 0
    window: int | None = None
    query_position: Tensor | None = None
    key_position: Tensor | None = None
    _cache: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)

    def moved(self, move: Move) -> TreeMask:
        """The same mask, and the work lists that can be moved, with `move` of every tensor, in a fixed order."""
        tensors: dict[str, Any] = {name: move(x) for name, x in vars(self).items() if isinstance(x, Tensor)}
        lists = {key: plan.moved(move) for key, plan in self._cache.items() if isinstance(plan, Movable)}
        return replace(self, **tensors, _cache=lists)

    def select_queries(self, rows: Tensor) -> TreeMask:
        """The same keys seen from the query rows `rows` [n] (indices into this mask's queries, ascending)."""
        position = None if self.query_position is None else self.query_position[rows]
        return replace(self, query_index=self.query_index[rows], query_position=position, _cache={})

    def select_keys(self, keys: Tensor) -> TreeMask:
        """The same queries looking at the keys `keys` [n] (indices into this mask's keys) only; no prefix."""
        position = None if self.key_position is None else self.key_position[keys]
        begin, end = self.key_begin[keys], self.key_end[keys]
        return replace(self, key_begin=begin, key_end=end, key_position=position, prefix=0, _cache={})

    def visible(self) -> Tensor:
        """The mask as a dense boolean matrix [Nq, S]."""
        return self.visible_part(slice(None), slice(None))

    def visible_part(self, queries: slice, keys: slice | Tensor) -> Tensor:
        """The same for some query rows and some keys."""
        i = self.query_index[queries, None]
        seen = (self.key_begin[keys] <= i) & (i < self.key_end[keys])
        if self.window is not None:
            assert self.query_position is not None
            assert self.key_position is not None
            seen &= self.query_position[queries, None] - self.key_position[keys] < self.window
        return seen

    def query_slices(self, size: int) -> list[slice]:
        """Slices of at most `size` query rows, cut where a subtree ends if that leaves a quarter of `size` or more."""
        count = len(self.query_index)
        ends = torch.searchsorted(self.query_index, self.key_end.unique()).tolist()
        slices, start = [], 0
        while start < count:
            limit = min(start + size, count)
            stop = next((end for end in ends if start + size // 4 <= end <= limit and end > start), limit)
            slices.append(slice(start, stop))
            start = stop
        return slices

    def cached(self, key: object, make: Callable[[], Plan]) -> Plan:
        """What `make` returns, made once per mask and key: a backend's work list, which every layer uses."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]
