"""The token tree: training sequences packed so that what they share is computed once.

The sequences of a step form a trie over (token id, prompt row). Its nodes are packed depth first, and one interval per
key is the whole attention mask: the key at tree index `j` is visible to the queries `i` with
`key_begin[j] <= i < key_end[j]`, where `key_begin[j] = j` and `key_end[j]` is one past the last index of `j`'s subtree.

What stands before the first prompt row of a sequence never changes while the prompt is optimised. Such tokens are not
packed: they are *prefix units* whose keys and values are computed once and stand in front of the tree's own keys, each
visible to the interval of its own descendants. The last token of a sequence predicts nothing and is not packed either.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from embedgrad.backends.mask import TreeMask


class TokenSequence(Protocol):
    """One rendered sequence (`embedgrad.prompt.rendering.Rendered`)."""

    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def prompt_rows(self) -> Sequence[int]: ...
    @property
    def target_mask(self) -> Sequence[bool]: ...
    @property
    def constant_prefix(self) -> int: ...


@dataclass(frozen=True)
class PrefixUnit:
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
class TokenTree:
    """One step's packed tokens (T of them), the prefix units in front, and the targets (N of them); all on the CPU.

    ids, prompt_rows, positions [T] int64; key_end [T] int32. `prompt_rows` is -1 where no prompt row is shown.
    predicting [R] int64: tree indices whose next token is a target, ascending. Target n (in order of slot) is the
    token `target_ids[n]` after `predicting[target_slot[n]]`, belongs to example `target_example[n]`, and counts
    `target_weights[n]` in the loss (mean over examples of the mean over their targets; float64). `leaves[b]` is the
    tree index of the last packed token of sequence `b`.
    prompt_positions [P] int64: tree indices that show a prompt row, ascending.
    """

    ids: Tensor
    prompt_rows: Tensor
    positions: Tensor
    key_end: Tensor
    units: tuple[PrefixUnit, ...]
    predicting: Tensor
    target_slot: Tensor
    target_ids: Tensor
    target_example: Tensor
    target_weights: Tensor
    leaves: Tensor
    prompt_positions: Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_prefix(self) -> int:
        return sum(len(unit.ids) for unit in self.units)

    @classmethod
    def without_targets(
        cls, ids: Tensor, prompt_rows: Tensor, positions: Tensor, key_end: Tensor, units: tuple[PrefixUnit, ...],
        leaves: Tensor,
    ) -> TokenTree:  # fmt: skip
        """A tree that predicts nothing: of a prefix, or of queries to be answered."""
        none = torch.empty(0, dtype=torch.int64)
        return cls(
            ids, prompt_rows, positions, key_end, units, predicting=none, target_slot=none, target_ids=none,
            target_example=none, target_weights=none.double(), leaves=leaves,
            prompt_positions=(prompt_rows >= 0).nonzero().squeeze(1),
        )  # fmt: skip

    def mask(self, window: int | None = None, *, always: bool = False) -> TreeMask:
        """The attention mask of all T queries over `num_prefix + T` keys; `window`: a sliding one, in tokens, which is
        left out where nothing lies outside of it (unless `always`)."""
        own = torch.arange(self.num_tokens, dtype=torch.int32)
        begins, ends, positions = [], [], []
        for unit in self.units:
            n = len(unit.ids)
            begins.append(torch.full((n,), unit.begin, dtype=torch.int32))
            ends.append(torch.full((n,), unit.end, dtype=torch.int32))
            positions.append(torch.arange(unit.start_position, unit.start_position + n))
        key_begin, key_end = torch.cat([*begins, own]), torch.cat([*ends, self.key_end])
        if window is None or not (always or int(self.positions.max()) >= window):
            return TreeMask(key_begin, key_end, own, self.num_prefix)
        return TreeMask(
            key_begin, key_end, own, self.num_prefix, window, self.positions, torch.cat([*positions, self.positions])
        )

    def padded(self, tokens: int, prefix: int, rows: int, shown: int, targets: int) -> TokenTree:
        """The same tree with more tokens, keys in front, predicting tokens, prompt positions and targets.

        No query sees a token of the padding, which itself sees nothing; what is padded otherwise points to the first
        such token. Targets of the padding are ignored (id −1, weight 0, example −1) and come after the others; their
        slots are those of the padded rows, in order. There must be at least one more token where rows or prompt
        positions are padded.
        """

        def more(x: Tensor, count: int, value: float) -> Tensor:
            return torch.cat([x, x.new_full((count - len(x),), value)])

        first, missing = self.num_tokens, prefix - self.num_prefix
        unit = PrefixUnit(((0,) * missing,), 0, 0)
        slots = torch.arange(len(self.target_slot), targets).clamp(max=rows - 1)
        return TokenTree(
            ids=more(self.ids, tokens, 0),
            prompt_rows=more(self.prompt_rows, tokens, -1),
            positions=more(self.positions, tokens, 0),
            key_end=more(self.key_end, tokens, 0),
            units=(*self.units, unit) if missing else self.units,
            predicting=more(self.predicting, rows, first),
            target_slot=torch.cat([self.target_slot, slots]),
            target_ids=more(self.target_ids, targets, -1),
            target_example=more(self.target_example, targets, -1),
            target_weights=more(self.target_weights, targets, 0.0),
            leaves=self.leaves,
            prompt_positions=more(self.prompt_positions, shown, first),
        )


class PreparedSequence:
    """A sequence as arrays, made once for all trees that it will be part of.

    symbols [u + n] int64: one number for each of its u prefix units, then one for each of the n packed tokens; two
    sequences share a trie node where they share all symbols up to it. ids, rows [n] int64. start: position of the first
    packed token. target_at, target_ids: packed index, within the sequence, of the token before each target, and the
    target.
    """

    def __init__(self, sequence: TokenSequence, keep: bool = True) -> None:
        """`keep=False` packs what stands before the first prompt row as well."""
        ids, rows = np.asarray(sequence.ids, np.int64), np.asarray(sequence.prompt_rows, np.int64)
        wanted = np.flatnonzero(np.asarray(sequence.target_mask, bool))
        spans = _unit_spans(rows, sequence.constant_prefix) if keep else []
        self.length = len(ids)  # as it was rendered
        self.start = spans[-1][1] if spans else 0
        stop = int(wanted[-1]) if len(wanted) else len(ids)  # the last token predicts nothing
        assert self.start < (int(wanted[0]) if len(wanted) else stop), "a target must follow a packed token"
        runs = [tuple(ids[first:last].tolist()) for first, last in spans]
        self.paths = [tuple(runs[: n + 1]) for n in range(len(runs))]
        self.ids, self.rows = ids[self.start : stop], rows[self.start : stop]
        units = [_number_of(ids[:last], first) for first, last in spans]
        self.symbols = np.concatenate([np.array(units, np.int64), self.ids * _ROWS + self.rows + 1])
        self.target_at, self.target_ids = wanted - 1 - self.start, ids[wanted]

    def shifted(self, rows: int) -> PreparedSequence:
        """The same sequence with a prompt whose rows stand `rows` further down, behind those of other prompts."""
        moved = copy.copy(self)
        shows = self.rows >= 0
        moved.rows = np.where(shows, self.rows + rows, self.rows)
        moved.symbols = self.symbols.copy()
        moved.symbols[len(self.paths) :] += np.where(shows, rows, 0)
        return moved


_ROWS = 1 << 24  # prompt rows that a symbol tells apart


def _unit_spans(rows: np.ndarray, constant_prefix: int) -> list[tuple[int, int]]:
    """Spans of the prefix units: the template's constant part, then the rest before the first prompt row."""
    shown = np.flatnonzero(rows >= 0)
    first = int(shown[0]) if len(shown) else 0
    constant = min(constant_prefix, first)
    return [(a, b) for a, b in ((0, constant), (constant, first)) if a < b]


def _number_of(ids: np.ndarray, start: int) -> int:
    """A negative number for a unit that begins at `start` and ends with `ids`: 62 bits of its hash."""
    digest = hashlib.blake2b(ids.tobytes() + start.to_bytes(8, "little"), digest_size=8).digest()
    return -2 - (int.from_bytes(digest, "little") >> 2)


def prepare(sequences: Sequence[TokenSequence | PreparedSequence], keep: bool = True) -> list[PreparedSequence]:
    """The sequences as arrays."""
    return [s if isinstance(s, PreparedSequence) else PreparedSequence(s, keep) for s in sequences]


def build_tree(
    sequences: Sequence[TokenSequence | PreparedSequence],
    weights: Sequence[float] | None = None,
    *,
    share: bool = True,
    keep: bool = True,
) -> TokenTree:
    """Pack `sequences` into one tree. A sequence without targets is packed whole (generation).

    weights: one per example, default all 1. `share=False` packs every sequence by itself; `keep=False` packs what
    stands before the first prompt row as well (of sequences that are not prepared yet).

    The trie is never built: in depth-first order, a sequence adds to it what stands behind the longest prefix that it
    shares with the sequence before it.
    """
    prepared = prepare(sequences, keep)
    order, shared = _depth_first(prepared) if share else (list(range(len(prepared))), [0] * len(prepared))
    return _pack(prepared, order, shared, [1.0] * len(prepared) if weights is None else weights)


def _depth_first(sequences: list[PreparedSequence]) -> tuple[list[int], list[int]]:
    """The sequences in depth-first order of their trie, siblings by first occurrence, and the number of symbols
    that each shares with the one before it."""
    lengths = np.array([len(s.symbols) for s in sequences])
    table = np.full((len(sequences), int(lengths.max()) + 1), -1, np.int64)  # −1 is nobody's symbol
    for row, s in zip(table, sequences, strict=True):
        row[: len(s.symbols)] = s.symbols
    keys = [row.tobytes() for row in table]
    ranked = sorted(range(len(keys)), key=keys.__getitem__)  # sequences that share a prefix are neighbours
    differ = table[ranked[1:]] != table[ranked[:-1]]
    common = np.minimum(differ.argmax(1), np.minimum(lengths[ranked[1:]], lengths[ranked[:-1]]))
    same = ~differ.any(1)
    common[same] = lengths[ranked[1:]][same]
    order = _by_first_occurrence(ranked, common.tolist())
    place = {b: rank for rank, b in enumerate(ranked)}
    shared = [0]
    for before, after in pairwise(order):
        low, high = sorted((place[before], place[after]))
        shared.append(int(common[low:high].min()))
    return order, shared


def _by_first_occurrence(ranked: list[int], common: list[int]) -> list[int]:
    """The leaves of the tree over `ranked`, whose neighbours share `common` symbols, with siblings in input order."""
    order: list[int] = []
    stack = [(0, len(ranked))]
    while stack:
        low, high = stack.pop()
        if high - low == 1:
            order.append(ranked[low])
            continue
        depth = min(common[low : high - 1])
        cuts = [low, *(i + 1 for i in range(low, high - 1) if common[i] == depth), high]
        stack += sorted(pairwise(cuts), key=lambda span: -min(ranked[span[0] : span[1]]))
    return order


def _pack(
    sequences: list[PreparedSequence], order: list[int], shared: list[int], weights: Sequence[float]
) -> TokenTree:
    firsts, ids, rows, positions = [0], [], [], []  # firsts: the first tree index of each sequence's own tokens
    index: list[np.ndarray] = [np.empty(0, np.int64)] * len(sequences)  # tree index of each of a sequence's tokens
    above = index[0]
    for b, common in zip(order, shared, strict=True):
        s = sequences[b]
        own = slice(max(common - len(s.paths), 0), len(s.ids))
        count = own.stop - own.start
        above = index[b] = np.concatenate([above[: own.start], np.arange(firsts[-1], firsts[-1] + count)])
        ids.append(s.ids[own])
        rows.append(s.rows[own])
        positions.append(np.arange(s.start + own.start, s.start + own.stop))
        firsts.append(firsts[-1] + count)
    units, lengths, ends = [], [], []
    for i, spans in enumerate(_subtrees(shared, [len(sequences[b].symbols) for b in order])):
        paths = sequences[order[i]].paths
        for low, high, end in spans:
            units += [PrefixUnit(path, firsts[i], firsts[end]) for path in paths[low:high]]
            lengths.append(max(high - max(low, len(paths)), 0))
            ends.append(firsts[end])
    counts = [len(s.target_ids) for s in sequences]
    at = np.concatenate([own[s.target_at] for own, s in zip(index, sequences, strict=True)])
    by_place = np.argsort(at, kind="stable")
    predicting, slot = np.unique(at[by_place], return_inverse=True)
    total = sum(weights)
    shares = [weight / total / max(count, 1) for weight, count in zip(weights, counts, strict=True)]
    return TokenTree(
        ids=_tensor(ids),
        prompt_rows=_tensor(rows),
        positions=_tensor(positions),
        key_end=torch.from_numpy(np.repeat(np.array(ends, np.int32), lengths)),
        units=tuple(units),
        predicting=_tensor([predicting]),
        target_slot=_tensor([slot]),
        target_ids=_tensor([np.concatenate([s.target_ids for s in sequences])[by_place]]),
        target_example=_tensor([np.repeat(np.arange(len(sequences)), counts)[by_place]]),
        target_weights=torch.from_numpy(np.repeat(np.array(shares, np.float64), counts)[by_place]),
        leaves=_tensor([[own[-1] for own in index]]),
        prompt_positions=_tensor([np.flatnonzero(np.concatenate(rows) >= 0)]),
    )


def _tensor(parts: Sequence[Any]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.asarray(part, np.int64) for part in parts]))


def _subtrees(shared: list[int], lengths: list[int]) -> list[list[tuple[int, int, int]]]:
    """For each sequence, in depth-first order, its own symbols [low, high) and the sequence at which their subtrees
    end: the next that shares no more than `low` symbols with the one before it (the number of sequences: at the end).
    """
    later: list[tuple[int, int]] = []  # (shared, sequence), nearest last; farther ones share less
    found: list[list[tuple[int, int, int]]] = []
    for i in reversed(range(len(shared))):
        low, high, spans = shared[i], lengths[i], []
        for common, end in reversed([(-1, len(shared)), *later]):
            spans.append((max(common, low), high, end))
            high = min(max(common, low), high)
            if common <= low:
                break
        found.append(spans[::-1])
        while later and later[-1][0] >= low:
            later.pop()
        later.append((low, i))
    return found[::-1]


def pack_branches(sequences: Sequence[TokenSequence], shared: int) -> TokenTree:
    """Whole sequences behind their `shared` first tokens, which are one prefix unit; nothing else is merged."""
    lengths = [len(s.ids) - shared for s in sequences]
    ends = torch.tensor(lengths).cumsum(0)
    unit = PrefixUnit((tuple(sequences[0].ids[:shared]),), 0, int(ends[-1]))
    return TokenTree.without_targets(
        ids=torch.tensor([i for s in sequences for i in s.ids[shared:]], dtype=torch.int64),
        prompt_rows=torch.tensor([r for s in sequences for r in s.prompt_rows[shared:]], dtype=torch.int64),
        positions=torch.cat([torch.arange(shared, shared + n) for n in lengths]),
        key_end=torch.repeat_interleave(ends, torch.tensor(lengths)).int(),
        units=(unit,) if shared else (),
        leaves=ends - 1,
    )
