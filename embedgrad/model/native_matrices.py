"""Descriptions of frozen matrices for csrc/decode/: addresses of the stored tensors and their form of storage.

A quantised matrix (`embedgrad.model.quantised`) is in tiles, by which csrc/ multiplies, or in the blocks of a file,
whose rows csrc/ only reads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from embedgrad.backends.native_core import STORED, Matrix, Part, library
from embedgrad.kernels.packing import PackedWeight

_FLOATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@cache
def is_built() -> bool:
    """Whether csrc/ can be called."""
    try:
        library()
    except ImportError:
        return False
    return True


def native_matrix(parts: Sequence[Any], bias: Tensor | None) -> Matrix | None:
    """The matrix made of `parts` (tensors or weights [out_i, in], stacked by matrix rows) and `bias` [out].

    None where csrc/ has no product for the form in which one of them is stored. The result holds pointers into `parts`
    and `bias`, so the caller must keep them alive.
    """
    matrix = readable_matrix(parts, bias)
    if matrix is None or any(matrix.parts[i].in_blocks for i in range(matrix.num_parts)):
        return None
    return matrix


def readable_matrix(parts: Sequence[Any], bias: Tensor | None = None) -> Matrix | None:
    """The same for a matrix whose rows are only read, of which a part may be in the blocks of a file."""
    described = [part for part in map(_part, parts) if part is not None]
    if len(described) < len(parts) or (bias is not None and not _usable(bias, torch.float32)):
        return None
    array = (Part * len(described))(*described)
    rows = sum(part.shape[0] for part in parts)
    return Matrix(array, len(described), rows, parts[0].shape[1], None if bias is None else bias.data_ptr())


def _usable(x: Tensor, dtype: torch.dtype) -> bool:
    return x.device.type == "cpu" and x.dtype == dtype and x.is_contiguous()


def _part(part: Any) -> Part | None:
    if isinstance(part, PackedWeight):  # the Triton kernels' form
        return None
    if not isinstance(part, Tensor):
        described: Part = part.part()
        return described
    kind = _FLOATS.get(part.dtype)
    if kind is None or part.device.type != "cpu" or part.stride(-1) != 1:
        return None
    return Part(STORED.index(kind), 0, 0, part.shape[0], part.stride(0) * part.element_size(), part.data_ptr())


def widen(parts: Sequence[Any], out: Tensor) -> bool:
    """Writes the matrix of `parts` to `out` [N, K], which is contiguous and float32.

    Returns False, and writes nothing, where csrc/ is not built or cannot read a part.
    """
    matrix = readable_matrix(parts) if is_built() else None
    if matrix is None:
        return False
    threads = torch.get_num_threads()
    library().embedgrad_widen(ctypes.byref(matrix), 0, matrix.rows, out.data_ptr(), threads)
    return True


def gather(part: Any, index: Tensor) -> Tensor:
    """The rows `index` [n] of a quantised part [N, K] in float32 [n, K]. csrc/ must be built."""
    matrix, rows = readable_matrix([part]), index.to(torch.int64).contiguous()
    assert matrix is not None
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < part.shape[0]:
        raise IndexError(f"rows {int(rows.min())} to {int(rows.max())} of a matrix with {part.shape[0]}")
    out = torch.empty(len(rows), part.shape[1])
    threads = torch.get_num_threads()
    library().embedgrad_gather(ctypes.byref(matrix), rows.data_ptr(), len(rows), out.data_ptr(), threads)
    return out


def few_rows(matrix: Matrix, x: Tensor, core: ctypes.CDLL) -> Tensor:
    """x Wᵀ + b for x [B, in], as float32 [B, out]: the product of the generation loop, for any B."""
    x = x.float().contiguous()
    y = torch.empty(len(x), matrix.rows, dtype=torch.float32)
    core.embedgrad_linear(ctypes.byref(matrix), x.data_ptr(), len(x), y.data_ptr(), torch.get_num_threads())
    return y
