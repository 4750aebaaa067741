"""Which blocks of keys meet which blocks of queries: the work lists of tree attention, built on the device.

Key j is visible to tree index i where key_begin[j] ≤ i < key_end[j] (and, with a sliding window, where
position_i − position_j < window). A key's queries are thus one interval, and queries ascend, so that four numbers per
block of keys say everything about a block of queries with tree indices in [first, last]:

    nothing visible    min key_begin > last   or   max key_end ≤ first
    all visible        max key_begin ≤ first  and  min key_end > last           (no mask needed)
    otherwise          some visible, or none: the kernel masks

Rows. A kernel's query block holds the query heads of one group side by side: row r is query r // group, head r % group
of the group. The heads share their keys, so a key tile is read once for all of them, and a leaf of 20 tokens fills a
matrix-core tile of 128 rows.

Two lists come from this.

    KeyLists     per block of rows: the blocks of keys to visit, wholly visible ones first (forward and dQ).
    QueryPieces  per block of keys: its rows [first visible, last visible], cut into pieces of equal length (dK, dV).
                 A prefix block has every later row, a leaf block few. With n_b row blocks behind key block b and
                 c = ⌈Σ n_b / programs⌉, block b is cut into ⌈n_b / c⌉ pieces: no piece is longer than its fair share of
                 the launch, and Σ ⌈n_b / c⌉ ≤ blocks + programs, a bound the host knows. Blocks of more than one piece
                 leave partial sums in slots, at most 2 · programs of them (⌈x⌉ ≤ 2x for x > 1).

Everything is a torch operation on the mask's device without a read-back, so that building the lists never waits for
the device and can be captured in a CUDA graph. The lists depend on the mask only: build one TreeSchedule per mask and
hand it to the launches of every layer.

The column-wise block bounds are those of FlashMask (arXiv 2410.01359, section 4); packing the group into the rows and
the fair pieces are ours.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, fields
from typing import TypeVar

import torch
from torch import Tensor

_LAST = 2**31 - 1
_NOWHERE = 2**30  # a position no token has; twice it still fits int32
Moved = TypeVar("Moved", bound="KeyLists | QueryPieces | TreeSchedule")
ROWS_ALIGNED = 4
"""Rows that a piece may begin at: four fp32 values are one 128-bit load."""


@dataclass(frozen=True)
class KeyLists:
    """order: [row blocks, key blocks] int32, wholly visible blocks first, then partly visible, then the rest.

    counts: [row blocks, 2] int32, how many of the first and of the second kind. begin, length (of the interval),
    position: [key blocks · block size] int32, filled up with keys nobody sees, so that no load of them needs a mask.
    """

    order: Tensor
    counts: Tensor
    begin: Tensor
    length: Tensor
    position: Tensor | None


@dataclass(frozen=True)
class QueryPieces:
    """pieces: [at most blocks + programs, 6] int32: key block (−1: none), rows begin, end, unmasked begin, end, slot.

    Rows begin at multiples of ROWS_ALIGNED. A slot of −1 means that this is the block's only piece. blocks:
    [key blocks, 2] int32: first slot, number of slots. slots: how many slots of partial sums the launch may need.
    row_index, row_position: [rows + block size] int32, those of each row's query; −1 where there is no row.
    """

    pieces: Tensor
    blocks: Tensor
    slots: int
    row_index: Tensor
    row_position: Tensor | None


@dataclass
class TreeSchedule:
    """The mask of one token tree, and the work lists made from it so far.

    key_begin, key_end: [S] int32. query_index: [Nq] int32, ascending. prefix: keys that are not the tree's own.
    query_position [Nq], key_position [S] int32 and window: all three, or none.
    Raises ValueError for shapes or types that do not fit together.
    """

    key_begin: Tensor
    key_end: Tensor
    query_index: Tensor
    prefix: int = 0
    query_position: Tensor | None = None
    key_position: Tensor | None = None
    window: int | None = None
    key_length: Tensor = field(init=False, repr=False)
    _lists: dict[tuple[int, ...], KeyLists] = field(default_factory=dict, repr=False)
    _pieces: dict[tuple[int, ...], QueryPieces] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.window is None:
            self.query_position = self.key_position = None
        elif self.query_position is None or self.key_position is None:
            raise ValueError("a sliding window needs query_position and key_position")
        queries, keys = self.query_index.shape, self.key_begin.shape
        expected = {
            "key_begin": keys,
            "key_end": keys,
            "query_index": queries,
            "query_position": queries,
            "key_position": keys,
        }
        for name, shape in expected.items():
            x = getattr(self, name)
            if x is None:
                continue
            if x.dtype != torch.int32 or x.dim() != 1 or x.shape != shape:
                raise ValueError(f"{name} is {x.dtype} {list(x.shape)}; expected int32 {list(shape)}")
            setattr(self, name, x.contiguous())
        if not 0 <= self.prefix <= len(self.key_begin):
            raise ValueError(f"prefix is {self.prefix}; there are {len(self.key_begin)} keys")
        self.key_length = (self.key_end - self.key_begin).clamp(min=0)

    @property
    def device(self) -> torch.device:
        return self.query_index.device

    def moved(self, move: Callable[[Tensor], Tensor]) -> "TreeSchedule":
        """The same mask and work lists with `move` of every tensor, in a fixed order."""
        copied = _with_moved(self, move)
        copied._lists = {key: _with_moved(lists, move) for key, lists in self._lists.items()}
        copied._pieces = {key: _with_moved(pieces, move) for key, pieces in self._pieces.items()}
        return copied

    def key_lists(self, group: int, block_q: int, block_k: int) -> KeyLists:
        """The lists for query blocks of block_q rows (query, head of the group) and key blocks of block_k keys."""
        key = (group, block_q, block_k)
        if key not in self._lists:
            self._lists[key] = self._key_lists(*key)
        return self._lists[key]

    def query_pieces(self, group: int, block_q: int, block_k: int, programs: int) -> QueryPieces:
        """The pieces for the tree's own keys in blocks of block_k, shared out over about `programs` programs."""
        key = (group, block_q, block_k, programs)
        if key not in self._pieces:
            self._pieces[key] = self._query_pieces(*key)
        return self._pieces[key]

    def _key_lists(self, group: int, block_q: int, block_k: int) -> KeyLists:
        rows = len(self.query_index) * group
        start = torch.arange(0, rows, block_q, device=self.device)
        first = self.query_index[start // group][:, None]
        last = self.query_index[(start + block_q - 1).clamp(max=rows - 1) // group][:, None]
        begin, end = self.key_begin, self.key_end
        seen = (_least(begin, block_k, _LAST) <= last) & (_most(end, block_k, 0) > first)
        # The keys that the last block lacks begin nowhere, so that block is never taken for wholly visible.
        whole = (_most(begin, block_k, _LAST) <= first) & (_least(end, block_k, 0) > last)
        if self.window is not None:
            assert self.query_position is not None
            assert self.key_position is not None
            of_rows = self.query_position.repeat_interleave(group)
            lowest, highest = _least(of_rows, block_q, _NOWHERE), _most(of_rows, block_q, -_NOWHERE)
            nearest = lowest[:, None] - _most(self.key_position, block_k, -_NOWHERE)
            farthest = highest[:, None] - _least(self.key_position, block_k, _NOWHERE)
            seen &= nearest < self.window
            whole &= farthest < self.window
        whole &= seen
        kind = 2 - seen.to(torch.int8) - whole.to(torch.int8)
        order = torch.argsort(kind, dim=1, stable=True).to(torch.int32)
        counts = torch.stack((whole.sum(1), (seen & ~whole).sum(1)), dim=1).to(torch.int32)
        begin, length = (_in_blocks(x, block_k, 0).view(-1) for x in (self.key_begin, self.key_length))
        position = None if self.key_position is None else _in_blocks(self.key_position, block_k, 0).view(-1)
        return KeyLists(order.contiguous(), counts.contiguous(), begin, length, position)

    def _query_pieces(self, group: int, block_q: int, block_k: int, programs: int) -> QueryPieces:
        begin, end = self.key_begin[self.prefix :], self.key_end[self.prefix :]

        def row_of(bound: Tensor) -> Tensor:
            """The first row whose query's tree index is at least the bound."""
            return torch.searchsorted(self.query_index, bound.contiguous()) * group

        low = row_of(_least(begin, block_k, _LAST)) // ROWS_ALIGNED * ROWS_ALIGNED
        high = torch.maximum(row_of(_most(end, block_k, 0)), low)
        count = (high - low + block_q - 1) // block_q
        # Row blocks [whole_low, whole_high) of the range see every key of the block.
        whole_low = ((row_of(_most(begin, block_k, 0)) - low + block_q - 1) // block_q).clamp(min=0)
        whole_low = torch.minimum(whole_low, count)
        whole_high = torch.maximum((row_of(_least(end, block_k, _LAST)) - low) // block_q, whole_low)
        if self.window is not None:  # a window cuts holes into the interval: mask everywhere
            whole_high = whole_low

        blocks = len(count)
        at_most = -(-len(self.query_index) * group // block_q) + 1  # row blocks of one key block
        length = ((count.sum() + programs - 1) // programs).clamp(min=1)
        pieces = ((count + length - 1) // length).clamp(min=1)
        last_piece = pieces.cumsum(0)
        split = torch.where(pieces > 1, pieces, 0)
        first_slot = split.cumsum(0) - split

        total = min(blocks + programs, blocks * at_most)
        number = torch.arange(total, device=self.device)
        block = torch.searchsorted(last_piece, number, right=True)
        used, block = block < blocks, block.clamp(max=blocks - 1)
        nth = number - (last_piece - pieces)[block]
        piece_low = torch.minimum(nth * length, count[block])
        piece_high = torch.minimum(piece_low + length, count[block])
        whole_from = torch.minimum(torch.maximum(whole_low[block], piece_low), piece_high)
        whole_to = torch.minimum(torch.maximum(whole_high[block], whole_from), piece_high)
        table = torch.stack(
            (
                torch.where(used, block, -1),
                low[block] + piece_low * block_q,
                torch.minimum(low[block] + piece_high * block_q, high[block]),
                low[block] + whole_from * block_q,
                low[block] + whole_to * block_q,
                torch.where(pieces[block] > 1, first_slot[block] + nth, -1),
            ),
            dim=1,
        )
        slots = min(2 * programs, blocks * at_most) if blocks else 0
        of_blocks = torch.stack((first_slot, split), dim=1).to(torch.int32)

        def of_rows(x: Tensor) -> Tensor:
            return torch.cat((x.repeat_interleave(group), x.new_full((block_q,), -1)))

        position = None if self.query_position is None else of_rows(self.query_position)
        return QueryPieces(table.to(torch.int32), of_blocks, slots, of_rows(self.query_index), position)


def _with_moved(record: Moved, move: Callable[[Tensor], Tensor]) -> Moved:
    tensors = {f.name: getattr(record, f.name) for f in fields(record)}
    moved = {name: move(x) for name, x in tensors.items() if isinstance(x, Tensor)}
    copied = copy(record)  # without another __post_init__, which would compute
    vars(copied).update(moved)
    return copied


def _in_blocks(x: Tensor, block: int, missing: int) -> Tensor:
    """[n] -> [⌈n / block⌉, block], the last block filled up."""
    padded = x.new_full((-(-len(x) // block) * block,), missing)
    padded[: len(x)] = x
    return padded.view(-1, block)


def _least(x: Tensor, block: int, missing: int) -> Tensor:
    return _in_blocks(x, block, missing).amin(1)


def _most(x: Tensor, block: int, missing: int) -> Tensor:
    return _in_blocks(x, block, missing).amax(1)
