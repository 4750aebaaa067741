"""Converts GGUF's simplest blocks to the layout of the Triton kernels: quant_groups of 32 elements with one scale."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from embedgrad.backends.native_core import library
from embedgrad.kernels.packing import PackedWeight, from_q4_0, from_q4_1, from_q8_0

REPACKED: dict[str, Callable[[Tensor], PackedWeight]] = {"Q4_0": from_q4_0, "Q4_1": from_q4_1, "Q8_0": from_q8_0}
"""The conversion for each block type. The position of a type is its number in csrc/decode/repack.h."""
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


def repacked(kind: str, blocks: Tensor) -> PackedWeight:
    """Blocks [N, block bytes · K/32] uint8 of a matrix [N, K] in our layout.

    kind: a key of REPACKED. csrc/ converts them in a tenth of the time that torch takes.
    """
    try:
        core = library()
    except ImportError:
        return REPACKED[kind](blocks)
    if blocks.device.type != "cpu" or blocks.dtype != torch.uint8 or blocks.stride(-1) != 1:
        return REPACKED[kind](blocks)
    rows, count = len(blocks), blocks.shape[1] // BLOCK_BYTES[kind]
    is_int4 = kind != "Q8_0"
    quant_groups = count + count % 2 if is_int4 else count
    packed = torch.empty(rows, quant_groups * (16 if is_int4 else 32), dtype=torch.uint8 if is_int4 else torch.int8)
    scales = torch.empty(rows, quant_groups, dtype=torch.float16)
    offsets = torch.empty_like(scales) if kind == "Q4_1" else None
    core.embedgrad_repack(
        list(REPACKED).index(kind), blocks.data_ptr(), blocks.stride(0), rows, count, packed.data_ptr(),
        scales.data_ptr(), None if offsets is None else offsets.data_ptr(),
    )  # fmt: skip
    return PackedWeight("int4" if is_int4 else "int8", packed, scales, offsets, 32, (rows, 32 * count))
