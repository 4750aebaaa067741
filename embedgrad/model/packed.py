"""Frozen matrices in int8 or int4, taken from a GGUF file or quantised while the weights are read.

The triton backend's products of a few rows read them as `PackedWeight`. On a CPU they come into csrc/'s tiles
(`in_tiles`). `FrozenMatrix` dequantises one piece at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from embedgrad.backends.base import Backend
from embedgrad.kernels.packing import PackedWeight, from_q4_0, from_q4_1, from_q8_0, quantize_int4, quantize_int8
from embedgrad.kernels.quantized_linear import NARROWEST_GROUP
from embedgrad.model.frozen import FrozenMatrix, Widening
from embedgrad.model.native_matrices import is_built
from embedgrad.model.quantised import BlockWeight, TileWeight
from embedgrad.util.errors import ModelError

QUANTISERS: dict[str, Callable[[Tensor], tuple[PackedWeight, float]]] = {"int8": quantize_int8, "int4": quantize_int4}

REPACKED: dict[str, Callable[[Tensor], PackedWeight]] = {"Q4_0": from_q4_0, "Q4_1": from_q4_1, "Q8_0": from_q8_0}
"""The GGUF types that the Triton kernels multiply by, with the conversion of their blocks."""


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
        if not self._few(dy):
            return super().backward(dy, out)
        return self._products.quantized_linear_backward(dy, self._weight, out=out)

    def _few(self, x: Tensor) -> bool:
        return len(x) <= self._products.quantized_rows and self._weight.group >= NARROWEST_GROUP

    def _of(self, parts: Sequence[Any], bias: Tensor | None) -> FrozenMatrix:
        return PackedMatrix(parts, bias, self._widening, self._products)


class PackedTable:
    """A quantised embedding table [V, d]. `table[ids]` and `table[start:stop]` are rows of the table in float32."""

    def __init__(self, weight: PackedWeight | BlockWeight | TileWeight) -> None:
        self.weight = weight

    def __len__(self) -> int:
        return self.weight.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        w = self.weight
        if not isinstance(w, PackedWeight):
            if isinstance(index, slice):
                start, stop, _ = index.indices(len(self))
                return w.rows(start, stop).dequantize()
            return w.gather(index.flatten()).view(*index.shape, w.shape[1])
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


def in_tiles(weight: PackedWeight) -> PackedWeight | TileWeight:
    """The matrix as csrc/ multiplies by it; unchanged where csrc/ is not built or has no such type."""
    if not is_built() or weight.group != 32 or (weight.offsets is None) != (weight.kind == "int8"):
        return weight
    half = weight.scales.dtype == torch.float16
    rows, groups = weight.shape[0], -(-weight.shape[1] // weight.group)
    numbers = [x[:, :groups, None].contiguous() for x in weight.tensors()[1:] if x is not None]
    q = weight.packed.view(torch.uint8)
    if weight.kind == "int4":  # a byte holds elements of both halves of the row; in a GGUF block, of both of a group's
        q = torch.cat([q & 15, q >> 4], dim=1)
    q = q.unflatten(1, (-1, weight.group))[:, :groups]
    if weight.kind == "int4":
        low, high = q.chunk(2, dim=2)
        q = low | high << 4
    blocks = torch.cat([*(x.view(torch.uint8) for x in numbers), q], dim=2).flatten(1)
    kind = {"int8": "Q8_0", "int4": "Q4_1"}[weight.kind] if half else weight.kind
    return TileWeight.of(BlockWeight(kind, blocks.view(rows, -1), weight.shape))


def is_packed(part: Any) -> bool:
    """Whether a part of a matrix is quantised."""
    return not isinstance(part, Tensor)


def as_tensor(table: Any) -> Any:
    """The embedding table as the part of a matrix, for a head that is tied to it."""
    return table.weight if isinstance(table, PackedTable) else table
