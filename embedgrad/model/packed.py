"""Frozen matrices in int8 or int4 blocks, taken from a GGUF file or quantised while the weights are read.

`FrozenMatrix` dequantises them one tile at a time. Where the backend has products that read the blocks, they take those
of a few rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from embedgrad.backends.base import Backend
from embedgrad.kernels.packing import (
    PackedWeight,
    quantize_int4,
    quantize_int8,
)
from embedgrad.kernels.quantized_linear import NARROWEST_GROUP
from embedgrad.model.frozen import FrozenMatrix, Widening
from embedgrad.model.gguf_blocks import BlockWeight
from embedgrad.util.errors import ModelError

QUANTISERS: dict[str, Callable[[Tensor], tuple[PackedWeight, float]]] = {"int8": quantize_int8, "int4": quantize_int4}


class PackedMatrix(FrozenMatrix):
    """A frozen matrix of one packed part. Products of a few rows read the stored blocks."""

    def __init__(self, parts: Sequence[Any], bias: Tensor | None, widening: Widening, products: Backend) -> None:
        super().__init__(parts, bias, widening)
        (self._weight,) = self.parts
        self._products = products

    def forward(self, x: Tensor, out: Tensor, *, add: Tensor | None = None) -> Tensor:
        """out [T, out] = x [T, in] Wᵀ + b (+ `add` [T, out]). `out` must not overlap `x`."""
        if not self._few(x):
            return super().forward(x, out, add=add)
        return self._products.quantized_linear(x, self._weight, out=out, bias=self.bias, add=add)

    def backward(self, dy: Tensor, out: Tensor) -> Tensor:
        """out [T, in] = dy [T, out] W."""
        if not self._few(dy) or dy.dtype == torch.float16:  # there, dy times a scale could underflow
            return super().backward(dy, out)
        return self._products.quantized_linear_backward(dy, self._weight, out=out)

    def _few(self, x: Tensor) -> bool:
        return len(x) <= self._products.quantized_rows and self._weight.group >= NARROWEST_GROUP

    def _of(self, parts: Sequence[Any], bias: Tensor | None) -> FrozenMatrix:
        return PackedMatrix(parts, bias, self._widening, self._products)


class PackedTable:
    """An embedding table [V, d] in blocks. `table[ids]` and `table[start:stop]` are rows of the table in float32."""

    def __init__(self, weight: PackedWeight | BlockWeight) -> None:
        self.weight = weight

    def __len__(self) -> int:
        return self.weight.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        w = self.weight
        if isinstance(w, BlockWeight):
            if isinstance(index, slice):
                index = torch.arange(len(self))[index]
            return w.take(index.flatten()).dequantize().view(*index.shape, w.shape[1])
        packed, offsets = w.packed[index], None if w.offsets is None else w.offsets[index]
        chosen = PackedWeight(w.kind, packed, w.scales[index], offsets, w.group, (len(packed), w.shape[1]))
        return chosen.dequantize()


def quantised(name: str, w: Tensor, kind: str) -> tuple[PackedWeight, float]:
    """(the matrix `w` quantised to `kind`, relative error ‖W − Ŵ‖/‖W‖).

    `name` is the tensor's name in messages. Raises ModelError for a matrix with infinite or NaN elements.
    """
    try:
        return QUANTISERS[kind](w)
    except ValueError as error:
        raise ModelError(f"{name} cannot be quantised: {error}.") from None


def is_packed(part: Any) -> bool:
    """Whether a part of a matrix is stored in blocks."""
    return not isinstance(part, Tensor)


def as_tensor(table: Any) -> Any:
    """The embedding table as the part of a matrix, for a head that is tied to it."""
    return table.weight if isinstance(table, PackedTable) else table
