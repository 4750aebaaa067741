"""Frozen matrices in GGUF's Q5_0, Q4_K and Q6_K blocks, exactly as in the file.

The blocks are mapped from the file; only matrices whose rows must be reordered are copied. csrc/decode/blocks.inl
dequantises them. Without csrc/ the gguf package does, several times more slowly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from embedgrad.model.native_matrices import native_matrix, widen

GGUF_BLOCKS = ("Q5_0", "Q4_K", "Q6_K")


@dataclass(frozen=True)
class BlockWeight:
    """A matrix [N, K]. kind: one of GGUF_BLOCKS. blocks: uint8 [N, bytes per matrix row] on the CPU. shape: (N, K)."""

    kind: str
    blocks: Tensor
    shape: tuple[int, int]

    def tensors(self) -> tuple[Tensor]:
        """The tensor that holds the matrix."""
        return (self.blocks,)

    @property
    def bytes(self) -> int:
        """Number of bytes that hold the matrix."""
        return self.blocks.numel()

    def rows(self, start: int, stop: int) -> BlockWeight:
        """The matrix rows [start, stop) as a matrix that shares the storage."""
        blocks = self.blocks[start:stop]
        return BlockWeight(self.kind, blocks, (len(blocks), self.shape[1]))

    def take(self, index: Tensor) -> BlockWeight:
        """A copy of the matrix rows `index` [n]."""
        return BlockWeight(self.kind, self.blocks[index], (len(index), self.shape[1]))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [N, K] in `dtype`. The float32 values are equal bit for bit to the gguf package's."""
        matrix = native_matrix([self], None)
        out = torch.empty(self.shape)
        if matrix is None or not widen(matrix, 0, len(out), out):
            out = torch.from_numpy(dequantize(self.blocks.numpy(), GGMLQuantizationType[self.kind]))
        return out.to(dtype)
