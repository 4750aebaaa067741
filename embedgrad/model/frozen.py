"""Frozen matrices. Callers see two products only; how a matrix is stored is hidden from them.

`forward(x)` is x Wᵀ (+ b) and `backward(dy)` is dy W. There is no gradient of W or b. A matrix may have several stored
parts, stacked by matrix rows (q, k and v; gate and up), so that one product serves all of them. A part is a tensor, a
`PackedWeight` (int8 or int4 for the Triton kernels), a `TileWeight` (for csrc/) or a `BlockWeight` (as in a GGUF file).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from embedgrad.kernels.packing import PackedWeight
from embedgrad.model.native_matrices import widen as native_widen
from embedgrad.model.quantised import TILE_ROWS, BlockWeight, TileWeight

Unpack = Callable[[Any, Tensor], object]

ROWS = 512  # rows of a narrow x that are converted to the products' type at once
TILE_BYTES = 16 << 20  # largest piece of a narrow matrix that is widened at once
# Longest sum in one backward product. BLAS adds all terms one after another in the products' type. Over a vocabulary of
# 49,152 terms the gradient of a real prompt had an error of 1.7e-4; with sums of this length it has 1.5e-5.
SUM_ROWS = 4096
DEVICE_TILE_BYTES = 256 << 20  # TILE_BYTES for a GPU; so large that most products are one call
UNPACKED = 1 << 20  # elements dequantised at once, so few that the intermediate values stay in the cache


def product_type(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type of the matrix products in a model that computes in `dtype`.

    On a CPU it is float32 for 16-bit types, because BLAS's products of 16-bit numbers are slow.
    """
    return torch.float32 if device.type == "cpu" and dtype.itemsize == 2 else dtype


class Widening:
    """The type of a model's matrix products, and the buffers for conversion to it, which all matrices share.

    Matrices in another type or in blocks are converted one tile at a time, x in another type some rows at a time.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, unpack: Unpack | None = None) -> None:
        """unpack: brings a part in blocks [n, m] into a matrix [n, m]; default: with torch, or csrc/ on a CPU."""
        self.dtype = dtype
        self.on_cpu = device.type == "cpu"
        self._device = device
        self._unpack = _unpack if unpack is None else unpack
        self._buffers: dict[str, Tensor] = {}
        self._largest_tile = 0

    def expect(self, tile: int) -> None:
        """A tile of so many elements will be asked for. On a GPU its buffer stays where it is once it is used, because
        captured launches know its address; so it is made for the largest."""
        self._largest_tile = max(self._largest_tile, tile)

    def buffer(self, name: str, rows: int, columns: int) -> Tensor:
        """An uninitialised matrix [rows, columns]. It is valid until the next call with the same name."""
        if rows * columns > len(self._buffers.get(name, ())):
            self._buffers[name] = torch.empty(0)  # frees the old buffer before the new one is allocated
            self._buffers[name] = torch.empty(rows * columns, dtype=self.dtype, device=self._device)
        return self._buffers[name][: rows * columns].view(rows, columns)

    def rows(self, x: Tensor) -> Tensor:
        """`x` [n, columns] in the type of the products: `x` itself, or a copy that is valid until the next call."""
        return x if x.dtype == self.dtype else self.buffer("rows", *x.shape).copy_(x)

    def widen(self, tiles: Sequence[Any], columns: int) -> Tensor:
        """`tiles` stacked by matrix rows, [n, columns] in the type of the products. Valid until the next call."""
        if len(tiles) == 1 and isinstance(tiles[0], Tensor) and tiles[0].dtype == self.dtype:
            return tiles[0]
        if not self.on_cpu:
            self.buffer("tile", 1, self._largest_tile)
        wide = self.buffer("tile", sum(tile.shape[0] for tile in tiles), columns)
        start = 0
        for tile in tiles:
            into = wide[start : start + tile.shape[0]]
            start += tile.shape[0]
            if isinstance(tile, Tensor):
                into.copy_(tile)
            else:
                self._unpack(tile, into)
        return wide


def _unpack(weight: PackedWeight | BlockWeight | TileWeight, out: Tensor) -> None:
    if out.dtype == torch.float32 and out.device.type == "cpu" and native_widen([weight], out):
        return
    step = max(1, UNPACKED // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        stop = min(start + step, weight.shape[0])
        out[start:stop].copy_(weight.rows(start, stop).dequantize())


def tensors_of(part: Any) -> list[Tensor]:
    """The tensors that hold a part of a matrix."""
    return [part] if isinstance(part, Tensor) else [x for x in part.tensors() if x is not None]


def moved(part: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """A copy of the part in which each tensor x that holds it is replaced by move(x)."""
    if isinstance(part, Tensor):
        return move(part)
    if isinstance(part, BlockWeight | TileWeight):
        return part.with_tensors(*map(move, part.tensors()))
    return cast(PackedWeight, part).moved(move)


class FrozenMatrix:
    """A frozen weight [out, in] with an optional frozen bias [out].

    parts: tensors or packed weights [out_i, in], stacked by matrix rows. A single tensor in the type of the products is
    used directly. Otherwise `widening` converts tiles of at most `TILE_BYTES` for each product. x, out and `add` may
    have a narrower type than the products: sums are computed in the products' type and rounded once.
    """

    def __init__(self, parts: Sequence[Any], bias: Tensor | None, widening: Widening) -> None:
        self.parts = list(parts)
        self.bias = bias
        self.shape = (sum(p.shape[0] for p in self.parts), self.parts[0].shape[1])
        self._widening = widening
        self._tiles = [(slice(0, self.shape[0]), self.parts)] if self._is_wide() else self._cut()
        if not self._is_wide():
            widening.expect(max((at.stop - at.start) * self.shape[1] for at, _ in self._tiles))

    def _is_wide(self) -> bool:
        (part, *others) = self.parts
        return not others and isinstance(part, Tensor) and part.dtype == self._widening.dtype

    def _cut(self) -> list[tuple[slice, list[Any]]]:
        tile_bytes = TILE_BYTES if self._widening.on_cpu else DEVICE_TILE_BYTES
        limit = max(1, tile_bytes // (self.shape[1] * self._widening.dtype.itemsize))
        tiles: list[tuple[slice, list[Any]]] = []
        if self.shape[0] <= limit:
            return [(slice(0, self.shape[0]), self.parts)]
        row = 0
        for part in self.parts:
            step = _even(part.shape[0], limit)
            for start in range(0, part.shape[0], step):
                piece = _rows(part, start, min(start + step, part.shape[0]))
                tiles.append((slice(row, row + piece.shape[0]), [piece]))
                row += piece.shape[0]
        return tiles

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that holds the matrix or its bias."""
        for part in self.parts:
            yield from tensors_of(part)
        if self.bias is not None:
            yield self.bias

    def moved(self, move: Callable[[Tensor], Tensor]) -> FrozenMatrix:
        """A copy of the matrix in which each tensor x is replaced by move(x), in the order of `tensors`."""
        parts = [moved(part, move) for part in self.parts]
        return self._of(parts, None if self.bias is None else move(self.bias))

    def _of(self, parts: Sequence[Any], bias: Tensor | None) -> FrozenMatrix:
        return FrozenMatrix(parts, bias, self._widening)

    def forward(self, x: Tensor, out: Tensor, *, add: Tensor | None = None) -> Tensor:
        """out [T, out] = x [T, in] Wᵀ + b (+ `add` [T, out]). `out` must not overlap `x`."""
        if not self._widening.on_cpu and x.dtype == self._widening.dtype:
            return self._forward_on_device(x, out, add)
        for at, tile in self._tiles:
            wide = self._widening.widen(tile, self.shape[1])
            to, added = out[:, at], None if add is None else add[:, at]
            bias = None if self.bias is None else self.bias[at]
            for rows in self._pieces(x, out):
                self._product(x[rows], wide, bias, to[rows], None if added is None else added[rows])
        return out

    def _forward_on_device(self, x: Tensor, out: Tensor, add: Tensor | None) -> Tensor:
        """`forward` with one product per tile. The product's epilogue adds `add`, or the bias if `add` is None."""
        for at, tile in self._tiles:
            weight, to = self._widening.widen(tile, self.shape[1]).T, out[:, at]
            bias = None if self.bias is None else self.bias[at]
            _multiply(x, weight, to, bias if add is None else add[:, at])
            if bias is not None and add is not None:
                to.add_(bias)
        return out

    def _backward_on_device(self, dy: Tensor, out: Tensor) -> Tensor:
        """`backward` with one product per tile. All products but the first add to what is there, in float32."""
        several = len(self._tiles) > 1 and out.dtype.itemsize < 4
        wide = torch.empty(out.shape, dtype=torch.float32, device=out.device) if several else out
        for n, (at, tile) in enumerate(self._tiles):
            _multiply(dy[:, at], self._widening.widen(tile, self.shape[1]), wide, wide if n else None)
        return out.copy_(wide) if several else out

    def _pieces(self, x: Tensor, out: Tensor) -> list[slice]:
        """All rows of x at once, or ROWS at a time where x or out must be converted."""
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
        if not widening.on_cpu and dy.dtype == widening.dtype:
            return self._backward_on_device(dy, out)
        whole = None if others else widening.widen(first[1], self.shape[1])
        if whole is not None and self.shape[0] <= SUM_ROWS and dy.dtype == out.dtype == widening.dtype:
            return torch.mm(dy, whole, out=out)
        if dy.dtype == out.dtype == widening.dtype:  # each tile is widened once, for all rows
            for n, (at, tile) in enumerate(self._tiles):
                weight = widening.widen(tile, self.shape[1]) if whole is None else whole
                for start in range(0, len(dy), ROWS):
                    rows = slice(start, start + ROWS)
                    self._add_products(dy[rows, at], weight, out[rows], empty=n == 0)
            return out
        for start in range(0, len(dy), ROWS):
            rows = slice(start, start + ROWS)
            wide = out[rows]
            if wide.dtype != widening.dtype:
                wide = widening.buffer("out", *wide.shape)
            for n, (at, tile) in enumerate(self._tiles):
                weight = widening.widen(tile, self.shape[1]) if whole is None else whole
                self._add_products(dy[rows, at], weight, wide, empty=n == 0)
            if wide.dtype != out.dtype:
                out[rows].copy_(wide)
        return out

    def _add_products(self, dy: Tensor, weight: Tensor, out: Tensor, *, empty: bool) -> None:
        """out += dy W, in sums of at most SUM_ROWS terms; empty: out holds nothing yet."""
        widening = self._widening
        for piece, part in zip(dy.split(SUM_ROWS, dim=1), weight.split(SUM_ROWS), strict=True):
            if empty:
                torch.mm(widening.rows(piece), part, out=out)
            else:
                out += torch.mm(widening.rows(piece), part, out=widening.buffer("sum", *out.shape))
            empty = False

    def rows(self, start: int, stop: int) -> FrozenMatrix:
        """The matrix rows [start, stop) as a matrix that shares the storage."""
        parts, row = [], 0
        for part in self.parts:
            first, last = max(start - row, 0), min(stop - row, part.shape[0])
            row += part.shape[0]
            if first < last:
                parts.append(_rows(part, first, last))
        return self._of(parts, None if self.bias is None else self.bias[start:stop])


def _multiply(x: Tensor, weight: Tensor, out: Tensor, add: Tensor | None) -> None:
    """out = x weight (+ add) in one product; out may be float32 where x and the weight have 16 bits."""
    if out.dtype == x.dtype:
        torch.mm(x, weight, out=out) if add is None else torch.addmm(add, x, weight, out=out)
    elif add is None:
        torch.mm(x, weight, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(add, x, weight, out_dtype=out.dtype, out=out)


def _even(rows: int, limit: int) -> int:
    """Rows of each of the fewest pieces of at most `limit` rows, equally large up to TILE_ROWS."""
    step = -(-rows // -(-rows // limit))
    return min(limit, -(-step // TILE_ROWS) * TILE_ROWS)


def _rows(part: Any, start: int, stop: int) -> Any:
    return part[start:stop] if isinstance(part, Tensor) else part.rows(start, stop)
