"""Descriptions of frozen matrices for csrc/decode/: addresses of the stored tensors and their form of storage."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from embedgrad.backends.native_core import STORED, Matrix, Part, library
from embedgrad.kernels.packing import PackedWeight

QUANT_GROUP = 32  # elements of a quant_group in csrc/decode/matrix.h
_FLOATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def native_matrix(parts: Sequence[Any], bias: Tensor | None) -> Matrix | None:
    """The matrix made of `parts` (tensors or packed weights [out_i, in], stacked by matrix rows) and `bias` [out].

    None where csrc/ has no product for the form in which one of them is stored. The result holds pointers into `parts`
    and `bias`, so the caller must keep them alive.
    """
    described = [part for part in map(_part, parts) if part is not None]
    if len(described) < len(parts) or (bias is not None and not _usable(bias, torch.float32)):
        return None
    array = (Part * len(described))(*described)
    rows = sum(part.shape[0] for part in parts)
    matrix = Matrix(array, len(described), rows, parts[0].shape[1], None if bias is None else bias.data_ptr())
    return matrix


def _usable(x: Tensor, dtype: torch.dtype) -> bool:
    return x.device.type == "cpu" and x.dtype == dtype and x.is_contiguous()


def _part(part: Any) -> Part | None:
    if isinstance(part, PackedWeight):
        return _packed_part(part)
    if not isinstance(part, Tensor):  # the third kind of part, a BlockWeight
        blocks = part.blocks
        if blocks.stride(1) != 1:
            return None
        return Part(STORED.index(part.kind), 0, len(blocks), blocks.stride(0), 0, blocks.data_ptr(), None, None)
    kind = _FLOATS.get(part.dtype)
    if kind is None or part.device.type != "cpu" or part.stride(-1) != 1:
        return None
    row_bytes = part.stride(0) * part.element_size()
    return Part(STORED.index(kind), 0, part.shape[0], row_bytes, 0, part.data_ptr(), None, None)


def _packed_part(weight: PackedWeight) -> Part | None:
    tensors = [x for x in weight.tensors() if x is not None]
    scales, offsets = weight.scales, weight.offsets
    if weight.group != QUANT_GROUP or not all(x.device.type == "cpu" and x.is_contiguous() for x in tensors):
        return None
    if offsets is not None and offsets.dtype != scales.dtype:
        return None
    half = scales.dtype == torch.float16
    if not half and scales.dtype != torch.float32:
        return None
    return Part(
        STORED.index(weight.kind), int(half), weight.shape[0], weight.packed.shape[1], scales.shape[1],
        weight.packed.data_ptr(), scales.data_ptr(), None if offsets is None else offsets.data_ptr(),
    )  # fmt: skip


def widen(matrix: Matrix, start: int, stop: int, out: Tensor) -> bool:
    """Writes the matrix rows [start, stop) to `out` [stop − start, in] float32, without the bias.

    Returns False, and writes nothing, where csrc/ is not built.
    """
    try:
        core = library()
    except ImportError:
        return False
    core.embedgrad_widen(ctypes.byref(matrix), start, stop, out.data_ptr(), torch.get_num_threads())
    return True


def few_rows(matrix: Matrix, x: Tensor, core: ctypes.CDLL) -> Tensor:
    """x Wᵀ + b for x [B, in], as float32 [B, out]: the product of the generation loop, for any B."""
    x = x.float().contiguous()
    y = torch.empty(len(x), matrix.rows, dtype=torch.float32)
    core.embedgrad_linear(ctypes.byref(matrix), x.data_ptr(), len(x), y.data_ptr(), torch.get_num_threads())
    return y
