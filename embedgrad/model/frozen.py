"""Frozen matrices: two verbs, and how they are stored is their own secret.

`forward(x)` is x Wᵀ (+ b) and `backward(dy)` is dy W; no gradient of W or b exists. A matrix may be made of several
stored parts that stand on top of each other (q, k and v; gate and up), so that one product serves all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TILE_BYTES = 64 << 20  # largest piece of a narrow matrix that is widened at once
# Longest sum that one backward product takes: BLAS adds term after term in the compute type, and over a vocabulary's
# 49,152 terms that made the gradient of a real prompt ten times less exact (1.7e-4 against 1.5e-5 with pieces).
SUM_ROWS = 4096


class Widening:
    """One buffer into which narrow matrices are widened, a tile at a time; shared by all matrices of a model."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self._buffer = torch.empty(0, dtype=dtype, device=device)

    def widen(self, tiles: Sequence[Tensor], columns: int) -> Tensor:
        """The rows of `tiles` on top of each other, in the compute type; valid until the next call."""
        rows = sum(len(tile) for tile in tiles)
        if rows * columns > len(self._buffer):
            self._buffer = torch.empty(rows * columns, dtype=self.dtype, device=self._buffer.device)
        wide = self._buffer[: rows * columns].view(rows, columns)
        start = 0
        for tile in tiles:
            wide[start : start + len(tile)].copy_(tile)
            start += len(tile)
        return wide


class FrozenMatrix:
    """A frozen weight [out, in] with an optional frozen bias [out].

    parts: stored tensors [out_i, in], stacked by rows. Where their type is the compute type they are one tensor and are
    used as they are; otherwise tiles of at most `TILE_BYTES` are widened through `widening` for each product.
    """

    def __init__(self, parts: Sequence[Tensor], bias: Tensor | None, widening: Widening) -> None:
        self.parts = list(parts)
        self.bias = bias
        self.shape = (sum(len(p) for p in self.parts), self.parts[0].shape[1])
        self._widening = widening
        self._tiles = None if self._is_wide() else self._cut()

    def _is_wide(self) -> bool:
        return len(self.parts) == 1 and self.parts[0].dtype == self._widening.dtype

    def _cut(self) -> list[tuple[slice, list[Tensor]]]:
        limit = max(1, TILE_BYTES // (self.shape[1] * self._widening.dtype.itemsize))
        tiles: list[tuple[slice, list[Tensor]]] = []
        if self.shape[0] <= limit:
            return [(slice(0, self.shape[0]), self.parts)]
        row = 0
        for part in self.parts:
            for piece in part.split(limit):
                tiles.append((slice(row, row + len(piece)), [piece]))
                row += len(piece)
        return tiles

    def forward(self, x: Tensor, out: Tensor, *, add: Tensor | None = None) -> Tensor:
        """out [T, out] = x [T, in] Wᵀ + b (+ `add` [T, out]); out must not overlap x."""
        if self._tiles is None:
            _product(x, self.parts[0], out, add)
        elif len(self._tiles) == 1:
            _product(x, self._widening.widen(self._tiles[0][1], self.shape[1]), out, add)
        else:
            for rows, tile in self._tiles:
                wide = self._widening.widen(tile, self.shape[1])
                out[:, rows] = x @ wide.T if add is None else torch.addmm(add[:, rows], x, wide.T)
        return out if self.bias is None else out.add_(self.bias)

    def backward(self, dy: Tensor, out: Tensor) -> Tensor:
        """out [T, in] = dy [T, out] W."""
        if self._tiles is None and self.shape[0] <= SUM_ROWS:
            return torch.mm(dy, self.parts[0], out=out)
        out.zero_()
        tiles = self._tiles or [(slice(0, self.shape[0]), self.parts)]
        for rows, tile in tiles:
            wide = tile[0] if self._tiles is None else self._widening.widen(tile, self.shape[1])
            for piece, weight in zip(dy[:, rows].split(SUM_ROWS, dim=1), wide.split(SUM_ROWS), strict=True):
                out += piece @ weight
        return out

    def rows(self, start: int, stop: int) -> FrozenMatrix:
        """The rows [start, stop) as a matrix of its own, sharing the storage."""
        parts, row = [], 0
        for part in self.parts:
            piece = part[max(start - row, 0) : max(stop - row, 0)]
            row += len(part)
            if len(piece):
                parts.append(piece)
        return FrozenMatrix(parts, None if self.bias is None else self.bias[start:stop], self._widening)


def _product(x: Tensor, weight: Tensor, out: Tensor, add: Tensor | None) -> None:
    if add is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(add, x, weight.T, out=out)
