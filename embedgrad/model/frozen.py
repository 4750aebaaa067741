"""Frozen matrices: two verbs, and how they are stored is their own secret.

`forward(x)` is x Wᵀ (+ b) and `backward(dy)` is dy W; no gradient of W or b exists. A matrix may be made of several
stored parts that stand on top of each other (q, k and v; gate and up), so that one product serves all of them. A part
is a tensor, a `PackedWeight` (int8 or int4 blocks) or a `BlockWeight` (a GGUF file's own blocks).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from embedgrad.kernels.packing import PackedWeight
from embedgrad.model.gguf_blocks import BlockWeight
from embedgrad.model.native_matrices import native_matrix
from embedgrad.model.native_matrices import widen as native_widen

ROWS = 512  # rows of x that are brought to the products' type at once, where they are narrower
TILE_BYTES = 16 << 20  # largest piece of a narrow matrix that is widened at once
# Longest sum that one backward product takes: BLAS adds term after term in the compute type, and over a vocabulary's
# 49,152 terms that made the gradient of a real prompt ten times less exact (1.7e-4 against 1.5e-5 with pieces).
SUM_ROWS = 4096
UNPACKED = 1 << 20  # elements dequantised at once: what that takes on the way stays in the cache


def product_type(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a model that computes in `dtype` multiplies in: on a CPU, BLAS's products of 16-bit numbers are slow."""
    return torch.float32 if device.type == "cpu" and dtype.itemsize == 2 else dtype


class Widening:
    """The type that a model's matrices multiply in, and the buffers in which all of them bring to it what is not.

    dtype: the type of the products. Narrow and packed matrices are widened a tile at a time, narrow x some rows.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, rows: int, columns: int) -> Tensor:
        """An uninitialised matrix; valid until the next call with that name."""
        if rows * columns > len(self._buffers.get(name, ())):
            self._buffers[name] = torch.empty(0)  # free the old one first
            self._buffers[name] = torch.empty(rows * columns, dtype=self.dtype, device=self._device)
        return self._buffers[name][: rows * columns].view(rows, columns)

    def rows(self, x: Tensor) -> Tensor:
        """`x` [n, columns] in the type of the products: itself, or a copy that is valid until the next call."""
        return x if x.dtype == self.dtype else self.buffer("rows", *x.shape).copy_(x)

    def widen(self, tiles: Sequence[Any], columns: int) -> Tensor:
        """The rows of `tiles` on top of each other, in the type of the products; valid until the next call."""
        if len(tiles) == 1 and isinstance(tiles[0], Tensor) and tiles[0].dtype == self.dtype:
            return tiles[0]
        wide = self.buffer("tile", sum(tile.shape[0] for tile in tiles), columns)
        start = 0
        for tile in tiles:
            into = wide[start : start + tile.shape[0]]
            start += tile.shape[0]
            if isinstance(tile, Tensor):
                into.copy_(tile)
            else:
                _unpack(tile, into)
        return wide


def _unpack(weight: PackedWeight | BlockWeight, out: Tensor) -> None:
    if out.dtype == torch.float32 and out.device.type == "cpu":
        matrix = native_matrix([weight], None)
        if matrix is not None and native_widen(matrix, 0, len(out), out):
            return
    step = max(1, UNPACKED // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        stop = min(start + step, weight.shape[0])
        out[start:stop].copy_(weight.rows(start, stop).dequantize())


def tensors_of(part: Any) -> list[Tensor]:
    """What a part of a matrix is stored in."""
    return [part] if isinstance(part, Tensor) else [x for x in part.tensors() if x is not None]


def moved(part: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """The part with every tensor that it is stored in replaced by `move` of it."""
    if isinstance(part, Tensor):
        return move(part)
    if isinstance(part, BlockWeight):
        return BlockWeight(part.kind, move(part.blocks), part.shape)
    packed, scales, offsets = (None if x is None else move(x) for x in part.tensors())
    assert packed is not None
    assert scales is not None
    return PackedWeight(part.kind, packed, scales, offsets, part.group, part.shape)


class FrozenMatrix:
    """A frozen weight [out, in] with an optional frozen bias [out].

    parts: tensors or packed weights [out_i, in], stacked by rows. One tensor in the type of the products is used as it
    is; otherwise tiles of at most `TILE_BYTES` are widened through `widening` for each product. x, out and `add` may be
    narrower than the products: sums are wide, and rounded once.
    """

    def __init__(self, parts: Sequence[Any], bias: Tensor | None, widening: Widening) -> None:
        self.parts = list(parts)
        self.bias = bias
        self.shape = (sum(p.shape[0] for p in self.parts), self.parts[0].shape[1])
        self._widening = widening
        self._tiles = [(slice(0, self.shape[0]), self.parts)] if self._is_wide() else self._cut()

    def _is_wide(self) -> bool:
        (part, *others) = self.parts
        return not others and isinstance(part, Tensor) and part.dtype == self._widening.dtype

    def _cut(self) -> list[tuple[slice, list[Any]]]:
        limit = max(1, TILE_BYTES // (self.shape[1] * self._widening.dtype.itemsize))
        tiles: list[tuple[slice, list[Any]]] = []
        if self.shape[0] <= limit:
            return [(slice(0, self.shape[0]), self.parts)]
        row = 0
        for part in self.parts:
            for start in range(0, part.shape[0], limit):
                piece = _rows(part, start, min(start + limit, part.shape[0]))
                tiles.append((slice(row, row + piece.shape[0]), [piece]))
                row += piece.shape[0]
        return tiles

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that the matrix is stored in."""
        for part in self.parts:
            yield from tensors_of(part)
        if self.bias is not None:
            yield self.bias

    def moved(self, move: Callable[[Tensor], Tensor]) -> FrozenMatrix:
        """The same matrix with every tensor replaced by `move` of it, in the order of `tensors`."""
        parts = [moved(part, move) for part in self.parts]
        return self._of(parts, None if self.bias is None else move(self.bias))

    def _of(self, parts: Sequence[Any], bias: Tensor | None) -> FrozenMatrix:
        return FrozenMatrix(parts, bias, self._widening)

    def forward(self, x: Tensor, out: Tensor, *, add: Tensor | None = None) -> Tensor:
        """out [T, out] = x [T, in] Wᵀ + b (+ `add` [T, out]); out must not overlap x."""
        for at, tile in self._tiles:
            wide = self._widening.widen(tile, self.shape[1])
            to, added = out[:, at], None if add is None else add[:, at]
            bias = None if self.bias is None else self.bias[at]
            for rows in self._pieces(x, out):
                self._product(x[rows], wide, bias, to[rows], None if added is None else added[rows])
        return out

    def _pieces(self, x: Tensor, out: Tensor) -> list[slice]:
        """All rows at once, or some at a time where something has to be widened."""
        step = len(x) if x.dtype == out.dtype == self._widening.dtype else ROWS
        return [slice(start, start + step) for start in range(0, len(x), max(1, step))]

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, add: Tensor | None) -> None:
        x, narrow = self._widening.rows(x), out.dtype != self._widening.dtype
        wide = self._widening.buffer("out", *out.shape) if narrow else out
        if add is None:
            torch.mm(x, weight.T, out=wide)
        else:
            torch.addmm(wide.copy_(add) if add.dtype != wide.dtype else add, x, weight.T, out=wide)
        if bias is not None:
            wide.add_(bias)
        if narrow:
            out.copy_(wide)

    def backward(self, dy: Tensor, out: Tensor) -> Tensor:
        """out [T, in] = dy [T, out] W."""
        widening, (first, *others) = self._widening, self._tiles
        whole = None if others else widening.widen(first[1], self.shape[1])
        if whole is not None and self.shape[0] <= SUM_ROWS and dy.dtype == out.dtype == widening.dtype:
            return torch.mm(dy, whole, out=out)
        for start in range(0, len(dy), ROWS):
            rows = slice(start, start + ROWS)
            wide = out[rows]
            if wide.dtype != widening.dtype:
                wide = widening.buffer("out", *wide.shape)
            empty = True
            for at, tile in self._tiles:
                weight = widening.widen(tile, self.shape[1]) if whole is None else whole
                for piece, part in zip(dy[rows, at].split(SUM_ROWS, dim=1), weight.split(SUM_ROWS), strict=True):
                    if empty:
                        torch.mm(widening.rows(piece), part, out=wide)
                    else:
                        wide += torch.mm(widening.rows(piece), part, out=widening.buffer("sum", *wide.shape))
                    empty = False
            if wide.dtype != out.dtype:
                out[rows].copy_(wide)
        return out

    def rows(self, start: int, stop: int) -> FrozenMatrix:
        """The rows [start, stop) as a matrix of its own, sharing the storage."""
        parts, row = [], 0
        for part in self.parts:
            first, last = max(start - row, 0), min(stop - row, part.shape[0])
            row += part.shape[0]
            if first < last:
                parts.append(_rows(part, first, last))
        return self._of(parts, None if self.bias is None else self.bias[start:stop])


def _rows(part: Any, start: int, stop: int) -> Any:
    return part[start:stop] if isinstance(part, Tensor) else part.rows(start, stop)
