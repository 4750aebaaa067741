"""Frozen matrices kept in int8 or int4 blocks: taken over from a GGUF file, or quantised while they are read.

On the triton backend the products read the blocks; elsewhere `FrozenMatrix` dequantises a tile at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from embedgrad.errors import ModelError
from embedgrad.kernels.packing import (
    PackedWeight,
    quantize_int4,
    quantize_int8,
)
from embedgrad.model.frozen import FrozenMatrix, Widening
from embedgrad.model.gguf_blocks import BlockWeight

QUANTISERS: dict[str, Callable[[Tensor], tuple[PackedWeight, float]]] = {"int8": quantize_int8, "int4": quantize_int4}


class Products(Protocol):
    """What a backend that multiplies by packed weights has: x Wᵀ (+ b) and dy W."""

    def quantized_linear(
        self, x: Tensor, weight: PackedWeight, *, out: Tensor, bias: Tensor | None = None
    ) -> Tensor: ...
    def quantized_linear_backward(self, dy: Tensor, weight: PackedWeight, *, out: Tensor) -> Tensor: ...


class PackedMatrix(FrozenMatrix):
    """A frozen matrix of one packed part whose products read the blocks as they are stored."""

    def __init__(self, parts: Sequence[Any], bias: Tensor | None, widening: Widening, products: Products) -> None:
        super().__init__(parts, bias, widening)
        (self._weight,) = self.parts
        self._products = products

    def forward(self, x: Tensor, out: Tensor, *, add: Tensor | None = None) -> Tensor:
        """out [T, out] = x [T, in] Wᵀ + b (+ `add` [T, out]); out must not overlap x or `add`."""
        self._products.quantized_linear(x, self._weight, out=out, bias=self.bias)
        return out if add is None else out.add_(add)

    def backward(self, dy: Tensor, out: Tensor) -> Tensor:
        """out [T, in] = dy [T, out] W."""
        return self._products.quantized_linear_backward(dy, self._weight, out=out)

    def _of(self, parts: Sequence[Any], bias: Tensor | None) -> FrozenMatrix:
        return PackedMatrix(parts, bias, self._widening, self._products)


class PackedTable:
    """An embedding table [V, d] in blocks; `table[ids]` and `table[start:stop]` are float32 rows."""

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
    """The matrix in `kind` and ‖W − Ŵ‖/‖W‖. Raises ModelError for a matrix with infinite or NaN elements."""
    try:
        return QUANTISERS[kind](w)
    except ValueError as error:
        raise ModelError(f"{name} cannot be quantised: {error}.") from None


def is_packed(part: Any) -> bool:
    """Whether a part of a matrix is stored in blocks."""
    return not isinstance(part, Tensor)


def as_tensor(table: Any) -> Any:
    """The part that a head tied to this table is made of."""
    return table.weight if isinstance(table, PackedTable) else table
