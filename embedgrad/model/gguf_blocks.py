"""Frozen matrices in GGUF's Q5_0, Q4_K and Q6_K blocks, exactly as the file has them; mapped from it, where their rows
need no reordering.

csrc/decode/blocks.inl unpacks them; without it the gguf package does, several times more slowly.
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
    """A matrix [N, K]. kind: one of GGUF_BLOCKS; blocks: uint8 [N, bytes per row], on the CPU; shape: (N, K)."""

    kind: str
    blocks: Tensor
    shape: tuple[int, int]

    def tensors(self) -> tuple[Tensor]:
        """What is stored."""
        return (self.blocks,)

    @property
    def bytes(self) -> int:
        """Bytes stored."""
        return self.blocks.numel()

    def rows(self, start: int, stop: int) -> BlockWeight:
        """The rows [start, stop) as a weight of its own, sharing the storage."""
        blocks = self.blocks[start:stop]
        return BlockWeight(self.kind, blocks, (len(blocks), self.shape[1]))

    def take(self, index: Tensor) -> BlockWeight:
        """The rows `index` [n]."""
        return BlockWeight(self.kind, self.blocks[index], (len(index), self.shape[1]))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [N, K]: float32, as the gguf package computes it to the bit, then converted."""
        matrix = native_matrix([self], None)
        out = torch.empty(self.shape)
        if matrix is None or not widen(matrix, 0, len(out), out):
            out = torch.from_numpy(dequantize(self.blocks.numpy(), GGMLQuantizationType[self.kind]))
        return out.to(dtype)
