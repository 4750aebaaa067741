"""GGUF's simplest blocks in our own layout, which the Triton kernels know: groups of 32 with one scale each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from embedgrad.backends.native_core import library
from embedgrad.kernels.packing import PackedWeight, from_q4_0, from_q4_1, from_q8_0

REPACKED: dict[str, Callable[[Tensor], PackedWeight]] = {"Q4_0": from_q4_0, "Q4_1": from_q4_1, "Q8_0": from_q8_0}
"""By the block's type; its place is the number that csrc/decode/repack.h knows it by."""
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


def repacked(kind: str, blocks: Tensor) -> PackedWeight:
    """Rows of blocks [N, block bytes · K/32] uint8 in our layout; in csrc/ where that is there, a tenth of the time."""
    try:
        core = library()
    except ImportError:
        return REPACKED[kind](blocks)
    if blocks.device.type != "cpu" or blocks.dtype != torch.uint8 or blocks.stride(-1) != 1:
        return REPACKED[kind](blocks)
    rows, count = len(blocks), blocks.shape[1] // BLOCK_BYTES[kind]
    is_int4 = kind != "Q8_0"
    groups = count + count % 2 if is_int4 else count
    packed = torch.empty(rows, groups * (16 if is_int4 else 32), dtype=torch.uint8 if is_int4 else torch.int8)
    scales = torch.empty(rows, groups, dtype=torch.float16)
    offsets = torch.empty_like(scales) if kind == "Q4_1" else None
    core.embedgrad_repack(
        list(REPACKED).index(kind), blocks.data_ptr(), blocks.stride(0), rows, count, packed.data_ptr(),
        scales.data_ptr(), None if offsets is None else offsets.data_ptr(),
    )  # fmt: skip
    return PackedWeight("int4" if is_int4 else "int8", packed, scales, offsets, 32, (rows, 32 * count))
