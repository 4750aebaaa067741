"""Quantised frozen matrices on the CPU: as they are in a GGUF file, and in the tiles that csrc/ multiplies by.

`TileWeight.of` reorders the bits of a `BlockWeight` once, while a model is loaded. A table of which only rows are read
stays mapped in the file. Without csrc/ everything does, and the gguf package dequantises it, several times more slowly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from embedgrad.backends.native_core import FIRST_QUANTISED, STORED, Part, library
from embedgrad.model.native_matrices import gather, is_built, widen

QUANTISED = STORED[FIRST_QUANTISED:]
"""The types that csrc/ multiplies by; those in capitals are GGUF's."""
TILE_ROWS = 16  # matrix rows of a tile (csrc/decode/formats.h)


@dataclass(frozen=True)
class BlockWeight:
    """A matrix [N, K] in the blocks of a file. kind: one of QUANTISED. blocks: uint8 [N, bytes per matrix row], CPU."""

    kind: str
    blocks: Tensor
    shape: tuple[int, int]

    def tensors(self) -> tuple[Tensor]:
        """The tensor that holds the matrix."""
        return (self.blocks,)

    def with_tensors(self, blocks: Tensor) -> BlockWeight:
        """The same matrix in another tensor."""
        return BlockWeight(self.kind, blocks, self.shape)

    def rows(self, start: int, stop: int) -> BlockWeight:
        """The matrix rows [start, stop) as a matrix that shares the storage."""
        blocks = self.blocks[start:stop]
        return BlockWeight(self.kind, blocks, (len(blocks), self.shape[1]))

    def gather(self, index: Tensor) -> Tensor:
        """The matrix rows `index` [n] in float32 [n, K]."""
        if is_built():
            return gather(self, index)
        return BlockWeight(self.kind, self.blocks[index], (len(index), self.shape[1])).dequantize()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [N, K] in `dtype`. The float32 values are equal bit for bit to the gguf package's."""
        out = torch.empty(self.shape)
        if not widen([self], out):
            out = torch.from_numpy(dequantize(self.blocks.numpy(), GGMLQuantizationType[self.kind]))
        return out.to(dtype)

    def part(self) -> Part:
        """The description for csrc/, which reads rows only."""
        blocks = self.blocks
        return Part(STORED.index(self.kind), 1, 0, len(blocks), blocks.stride(0), blocks.data_ptr())


@dataclass(frozen=True)
class TileWeight:
    """A matrix [N, K] in tiles of TILE_ROWS matrix rows, with the file's bits in the order of csrc/'s products.

    kind: one of QUANTISED. tiles: uint8 [tiles, bytes per tile] on the CPU. first: matrix rows of the first tile that
    do not belong to the matrix.
    """

    kind: str
    tiles: Tensor
    shape: tuple[int, int]
    first: int = 0

    @classmethod
    def of(cls, weight: BlockWeight) -> TileWeight:
        """The matrix `weight` in tiles. It must have columns, and csrc/ must be built."""
        core, stored, blocks = library(), STORED.index(weight.kind), weight.blocks
        rows, columns = weight.shape
        tiles = torch.empty(-(-rows // TILE_ROWS), core.embedgrad_tile_bytes(stored, columns), dtype=torch.uint8)
        core.embedgrad_repack(
            stored, blocks.data_ptr(), blocks.stride(0), rows, columns, tiles.data_ptr(), torch.get_num_threads()
        )
        return cls(weight.kind, tiles, weight.shape)

    def tensors(self) -> tuple[Tensor]:
        """The tensor that holds the matrix."""
        return (self.tiles,)

    def with_tensors(self, tiles: Tensor) -> TileWeight:
        """The same matrix in another tensor."""
        return TileWeight(self.kind, tiles, self.shape, self.first)

    def rows(self, start: int, stop: int) -> TileWeight:
        """The matrix rows [start, stop) as a matrix that shares the storage."""
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        begin, end = self.first + start, self.first + stop
        tiles = self.tiles[begin // TILE_ROWS : -(-end // TILE_ROWS)]
        return TileWeight(self.kind, tiles, (max(0, stop - start), self.shape[1]), begin % TILE_ROWS)

    def gather(self, index: Tensor) -> Tensor:
        """The matrix rows `index` [n] in float32 [n, K]."""
        return gather(self, index)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [N, K] in `dtype`. The float32 values are equal bit for bit to the gguf package's."""
        out = torch.empty(self.shape)
        widen([self], out)
        return out.to(dtype)

    def part(self) -> Part:
        """The description for csrc/."""
        return Part(STORED.index(self.kind), 0, self.first, self.shape[0], 0, self.tiles.data_ptr())
