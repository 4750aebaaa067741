"""The token tree: training sequences packed so that what they share is computed once.

The sequences of a step are merged into a trie over (token id, prompt row). Its nodes are packed depth first, and one
interval per key is the whole attention mask: the key at tree index `j` is visible to the queries `i` with
`key_begin[j] <= i < key_end[j]`, where `key_begin[j] = j` and `key_end[j]` is one past the last index of `j`'s subtree.

What stands before the first prompt row of a sequence never changes while the prompt is optimised. Such tokens are not
packed: they are *kept units* whose keys and values are computed once and stand in front of the tree's own keys, each
visible to the interval of its own descendants. The last token of a sequence predicts nothing and is not packed either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from embedgrad.machine import send

Plan = TypeVar("Plan")
QUERY_BLOCK = 128  # query rows that the block plan of `TreeMask.blocks` puts together


class TokenSequence(Protocol):
    """One rendered sequence (`embedgrad.rendering.Rendered`)."""

    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def prompt_rows(self) -> Sequence[int]: ...
    @property
    def target_mask(self) -> Sequence[bool]: ...
    @property
    def constant_prefix(self) -> int: ...


@dataclass(frozen=True)
class KeptUnit:
    """A run of tokens before the first prompt row, computed once; `path`: (ids of its ancestors…, its own ids)."""

    path: tuple[tuple[int, ...], ...]
    begin: int
    end: int

    @property
    def ids(self) -> tuple[int, ...]:
        return self.path[-1]

    @property
    def start_position(self) -> int:
        return sum(len(ids) for ids in self.path[:-1])


@dataclass(frozen=True)
class TreeMask:
    """Which query sees which key.

    key_begin, key_end [S] int32: key j is visible to tree index i iff `key_begin[j] <= i < key_end[j]`.
    query_index [Nq] int32, ascending: tree index of each query row. `kept`: number of kept keys in front.
    With a sliding `window`, a key is visible only if `query_position - key_position < window` as well.
    """

    key_begin: Tensor
    key_end: Tensor
    query_index: Tensor
    kept: int = 0
    window: int | None = None
    query_position: Tensor | None = None
    key_position: Tensor | None = None
    _cache: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device) -> TreeMask:
        """The same mask with its tensors on `device`."""
        moved: dict[str, Any] = {name: send(v, device) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved, _cache={})

    def select_queries(self, rows: Tensor) -> TreeMask:
        """The same keys seen from the query rows `rows` [n] (indices into this mask's queries, ascending)."""
        position = None if self.query_position is None else self.query_position[rows]
        return replace(self, query_index=self.query_index[rows], query_position=position, _cache={})

    def select_keys(self, keys: Tensor) -> TreeMask:
        """The same queries looking at the keys `keys` [n] (indices into this mask's keys) only; none is kept."""
        position = None if self.key_position is None else self.key_position[keys]
        begin, end = self.key_begin[keys], self.key_end[keys]
        return replace(self, key_begin=begin, key_end=end, key_position=position, kept=0, _cache={})

    def visible(self) -> Tensor:
        """The mask as a dense boolean matrix [Nq, S]."""
        return self._visible(slice(None), slice(None))

    def _visible(self, queries: slice, keys: slice | Tensor) -> Tensor:
        i = self.query_index[queries, None]
        seen = (self.key_begin[keys] <= i) & (i < self.key_end[keys])
        if self.window is not None:
            assert self.query_position is not None
            assert self.key_position is not None
            seen &= self.query_position[queries, None] - self.key_position[keys] < self.window
        return seen

    def blocks(self, size: int = QUERY_BLOCK) -> list[Block]:
        """Blocks of at most `size` queries with the keys that any of them sees; computed once, used by every layer.

        A block ends where a subtree ends, if that makes it a quarter of `size` or more: then it sees no other branch.
        """
        return self.cached(size, lambda: [self._block(queries) for queries in self.query_slices(size)])

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

    def _block(self, queries: slice) -> Block:
        index = self.query_index[queries]
        reachable = (self.key_begin <= index[-1]) & (self.key_end > index[0])
        found = reachable.nonzero().squeeze(1)
        keys: slice | Tensor = found
        if len(found) and int(found[-1]) - int(found[0]) + 1 == len(found):
            keys = slice(int(found[0]), int(found[-1]) + 1)
        hidden = ~self._visible(queries, keys)
        return Block(queries, keys, len(found), hidden if bool(hidden.any()) else None)


@dataclass(frozen=True)
class Block:
    """`queries` (a slice of query rows) see at most `keys`; `hidden` [queries, keys] marks those they do not see."""

    queries: slice
    keys: slice | Tensor
    num_keys: int
    hidden: Tensor | None
    _bias: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to scores: 0, or −inf where hidden; [queries, keys], None where all is visible."""
        if self.hidden is None:
            return None
        if dtype not in self._bias:
            zero = torch.zeros(self.hidden.shape, dtype=dtype, device=self.hidden.device)
            self._bias[dtype] = zero.masked_fill_(self.hidden, float("-inf"))
        return self._bias[dtype]


@dataclass(frozen=True)
class TokenTree:
    """One step's packed tokens (T of them), the kept units in front, and the targets (N of them); all on the CPU.

    ids, prompt_rows, positions [T] int64; key_end [T] int32. `prompt_rows` is -1 where no prompt row is shown.
    predicting [R] int64: tree indices whose next token is a target, ascending. Target n (in order of slot) is the
    token `target_ids[n]` after `predicting[target_slot[n]]`, belongs to example `target_example[n]`, and counts
    `target_weights[n]` in the loss (mean over examples of the mean over their targets; float64). `leaves[b]` is the
    tree index of the last packed token of sequence `b`.
    """

    ids: Tensor
    prompt_rows: Tensor
    positions: Tensor
    key_end: Tensor
    units: tuple[KeptUnit, ...]
    predicting: Tensor
    target_slot: Tensor
    target_ids: Tensor
    target_example: Tensor
    target_weights: Tensor
    leaves: Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_kept(self) -> int:
        return sum(len(unit.ids) for unit in self.units)

    @cached_property
    def prompt_positions(self) -> Tensor:
        """Tree indices that show a prompt row [P] int64, ascending."""
        return (self.prompt_rows >= 0).nonzero().squeeze(1)

    def mask(self, window: int | None = None) -> TreeMask:
        """The attention mask of all T queries over `num_kept + T` keys; `window`: a sliding one, in tokens."""
        own = torch.arange(self.num_tokens, dtype=torch.int32)
        begins, ends, positions = [], [], []
        for unit in self.units:
            n = len(unit.ids)
            begins.append(torch.full((n,), unit.begin, dtype=torch.int32))
            ends.append(torch.full((n,), unit.end, dtype=torch.int32))
            positions.append(torch.arange(unit.start_position, unit.start_position + n))
        key_begin, key_end = torch.cat([*begins, own]), torch.cat([*ends, self.key_end])
        if window is None or self._longest <= window:
            return TreeMask(key_begin, key_end, own, self.num_kept)
        return TreeMask(
            key_begin, key_end, own, self.num_kept, window, self.positions, torch.cat([*positions, self.positions])
        )

    @cached_property
    def _longest(self) -> int:
        return int(self.positions.max()) + 1


class _Trie:
    """Nodes in order of creation; node 0 is the root. A kept unit is one node without a tree index."""

    def __init__(self) -> None:
        self.children: list[list[int]] = [[]]
        self.parent = [0]
        self.label: list[tuple[int, int] | tuple[tuple[int, ...], ...]] = [()]
        self._find: dict[object, int] = {}

    def descend(self, node: int, label: tuple, owner: object) -> int:
        key = (node, label, owner)
        child = self._find.get(key)
        if child is None:
            child = self._find[key] = len(self.label)
            self.label.append(label)
            self.children.append([])
            self.parent.append(node)
            self.children[node].append(child)
        return child

    def depth_first(self) -> list[int]:
        order, stack = [], [0]
        while stack:
            node = stack.pop()
            order.append(node)
            stack.extend(reversed(self.children[node]))
        return order


def build_tree(
    sequences: Sequence[TokenSequence], weights: Sequence[float] | None = None, *, share: bool = True, keep: bool = True
) -> TokenTree:
    """Pack `sequences` into one tree. A sequence without targets is packed whole (generation).

    weights: one per example, default all 1. `share=False` packs every sequence by itself; `keep=False` packs what
    stands before the first prompt row as well.
    """
    trie = _Trie()
    targets: list[tuple[int, int, int]] = []  # (predicting node, token id, example)
    ends: list[int] = []
    for b, sequence in enumerate(sequences):
        owner = None if share else b
        node, start = 0, 0
        if keep:
            for start, stop in _unit_spans(sequence):
                path = (*(trie.label[node] if node else ()), tuple(sequence.ids[start:stop]))
                node, start = trie.descend(node, path, owner), stop
        wanted = [t for t, is_target in enumerate(sequence.target_mask) if is_target]
        stop = wanted[-1] if wanted else len(sequence.ids)
        assert start < (wanted[0] if wanted else stop), "a target (or the end) must come after a packed token"
        predicts = set(wanted)
        for t in range(start, stop):
            node = trie.descend(node, (sequence.ids[t], sequence.prompt_rows[t]), owner)
            if t + 1 in predicts:
                targets.append((node, sequence.ids[t + 1], b))
        ends.append(node)
    return _pack(trie, targets, ends, [1.0] * len(sequences) if weights is None else weights)


def _unit_spans(sequence: TokenSequence) -> list[tuple[int, int]]:
    """Spans of the kept units: the template's constant part, then the rest before the first prompt row."""
    first = next((i for i, row in enumerate(sequence.prompt_rows) if row >= 0), 0)
    constant = min(sequence.constant_prefix, first)
    return [(a, b) for a, b in ((0, constant), (constant, first)) if a < b]


def _pack(trie: _Trie, targets: list[tuple[int, int, int]], ends: list[int], weights: Sequence[float]) -> TokenTree:
    order = trie.depth_first()
    index = [0] * len(order)  # tree index of a node; of a unit: of its first descendant
    size = [0] * len(order)  # packed tokens in the node's subtree
    position = [-1] * len(order)  # position id of the node's last token
    ids: list[int] = []
    rows: list[int] = []
    positions: list[int] = []
    packed: list[int] = []
    units: list[tuple[int, tuple[tuple[int, ...], ...]]] = []
    for node in order[1:]:
        label, before = trie.label[node], position[trie.parent[node]]
        index[node] = len(ids)
        if isinstance(label[-1], tuple):
            units.append((node, label))
            position[node] = before + len(label[-1])
            continue
        position[node] = before + 1
        size[node] = 1
        packed.append(node)
        ids.append(label[0])
        rows.append(label[1])
        positions.append(position[node])
    for node in reversed(order[1:]):
        size[trie.parent[node]] += size[node]
    targets = sorted(targets, key=lambda target: index[target[0]])
    predicting = sorted({index[node] for node, _, _ in targets})
    slot = {i: s for s, i in enumerate(predicting)}
    counts = [0] * len(ends)
    for _, _, b in targets:
        counts[b] += 1
    total = sum(weights)
    return TokenTree(
        ids=torch.tensor(ids, dtype=torch.int64),
        prompt_rows=torch.tensor(rows, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        key_end=torch.tensor([index[n] + size[n] for n in packed], dtype=torch.int32),
        units=tuple(KeptUnit(path, index[n], index[n] + size[n]) for n, path in units),
        predicting=torch.tensor(predicting, dtype=torch.int64),
        target_slot=torch.tensor([slot[index[n]] for n, _, _ in targets], dtype=torch.int64),
        target_ids=torch.tensor([t for _, t, _ in targets], dtype=torch.int64),
        target_example=torch.tensor([b for _, _, b in targets], dtype=torch.int64),
        target_weights=torch.tensor([weights[b] / total / counts[b] for _, _, b in targets], dtype=torch.float64),
        leaves=torch.tensor([index[n] for n in ends], dtype=torch.int64),
    )


def pack_branches(sequences: Sequence[TokenSequence], shared: int) -> TokenTree:
    """Whole sequences behind their `shared` first tokens, which are one kept unit; nothing else is merged."""
    lengths = [len(s.ids) - shared for s in sequences]
    ends = torch.tensor(lengths).cumsum(0)
    total = int(ends[-1])
    none = torch.empty(0, dtype=torch.int64)
    unit = KeptUnit((tuple(sequences[0].ids[:shared]),), 0, total)
    return TokenTree(
        ids=torch.tensor([i for s in sequences for i in s.ids[shared:]], dtype=torch.int64),
        prompt_rows=torch.tensor([r for s in sequences for r in s.prompt_rows[shared:]], dtype=torch.int64),
        positions=torch.cat([torch.arange(shared, shared + n) for n in lengths]),
        key_end=torch.repeat_interleave(ends, torch.tensor(lengths)).int(),
        units=(unit,) if shared else (),
        predicting=none,
        target_slot=none,
        target_ids=none,
        target_example=none,
        target_weights=none.double(),
        leaves=ends - 1,
    )
