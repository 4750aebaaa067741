"""One allocation for all activations of a step.

A step first says how many bytes it will need (`memory` computes that); tensors that the backward pass reads
are taken from the bottom, scratch from the top, and nothing is returned to the allocator until a larger step comes. On
a CPU this is what keeps page faults out of the step; on a GPU it is what makes the peak predictable.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line, and what BLAS wants for reproducible results


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to the alignment of the arena."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Arena:
    """A two-ended stack of tensors in one buffer: `keep` from the bottom, `scratch` from the top."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self._bottom = self._top = 0
        self.peak = 0  # bytes in use at once since `begin`
        self.overflow = 0  # bytes that did not fit into the plan and were allocated apart

    def begin(self, nbytes: int) -> None:
        """Start a step that needs at most `nbytes`; every tensor of the step before is gone."""
        if nbytes > len(self.buffer):
            self.buffer = torch.empty(0, dtype=torch.uint8, device=self.device)  # free the old one first
            self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        self._bottom, self._top = 0, len(self.buffer) // ALIGNMENT * ALIGNMENT
        self.peak = self.overflow = 0

    def release(self) -> None:
        """Give the buffer back to the allocator."""
        self.buffer = torch.empty(0, dtype=torch.uint8, device=self.device)
        self.begin(0)

    def keep(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor that lives until it is dropped or the step ends."""
        nbytes = padded(math.prod(shape) * dtype.itemsize)
        if self._bottom + nbytes > self._top:
            return self._apart(shape, dtype, nbytes)
        start, self._bottom = self._bottom, self._bottom + nbytes
        return self._view(start, shape, dtype)

    def scratch(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor that lives until the innermost `frame` ends."""
        nbytes = padded(math.prod(shape) * dtype.itemsize)
        if self._top - nbytes < self._bottom:
            return self._apart(shape, dtype, nbytes)
        self._top -= nbytes
        return self._view(self._top, shape, dtype)

    @contextmanager
    def frame(self) -> Iterator[None]:
        """Scratch tensors taken inside are free again afterwards."""
        top = self._top
        try:
            yield
        finally:
            self._top = top

    def mark(self) -> int:
        """Where the next kept tensor will stand, for `drop`."""
        return self._bottom

    def drop(self, mark: int) -> None:
        """Free the tensors kept since `mark`."""
        self._bottom = mark

    def _apart(self, shape: tuple[int, ...], dtype: torch.dtype, nbytes: int) -> Tensor:
        self.overflow += nbytes
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _view(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        end = len(self.buffer) // ALIGNMENT * ALIGNMENT
        self.peak = max(self.peak, self._bottom + end - self._top)
        return self.buffer[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
