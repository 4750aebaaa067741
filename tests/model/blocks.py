"""Random blocks of every quantised type that csrc/ multiplies by, and what they stand for."""

from __future__ import annotations

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from embedgrad.model.quantised import BlockWeight

HALVES_AT = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
"""GGUF's types, with the bytes of a block at which a float16 begins."""
FLOATS_OF = {"int8": 1, "int8_16": 2, "int4": 2}
"""Our types, with the number of float32 numbers with which a block begins."""


def sizes(kind: str) -> tuple[int, int]:
    """(columns, bytes) of a block."""
    if kind in FLOATS_OF:
        return 32, 4 * FLOATS_OF[kind] + (16 if kind == "int4" else 32)
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def random_blocks(
    kind: str, rows: int, columns: int, draw: torch.Generator, *, exact: bool = False, apart: int = 0
) -> BlockWeight:
    """A matrix of at least so many columns with random elements, in rows that are `apart` bytes apart.

    exact: the float numbers are powers of two, so that sums of few small numbers are exact in float32.
    """
    width, size = sizes(kind)
    count = -(-columns // width)
    rows_of = torch.randint(0, 256, (rows, count * size + apart), generator=draw, dtype=torch.uint8)
    blocks = rows_of[:, : count * size].unflatten(1, (count, size))
    places = HALVES_AT.get(kind) or range(0, 4 * FLOATS_OF[kind], 4)
    for at in places:
        number = torch.rand(blocks.shape[:2], generator=draw) + 0.01
        number = torch.exp2(torch.floor(number.log2())).clamp(min=0.25) if exact else number
        number = number.half() if kind in HALVES_AT else number
        blocks[:, :, at : at + number.itemsize] = number[..., None].view(torch.uint8)
    return BlockWeight(kind, rows_of[:, : count * size], (rows, count * width))


def meaning(w: BlockWeight) -> Tensor:
    """W [N, K] in float32: by the gguf package, or for our types by their definition."""
    if w.kind in HALVES_AT:
        return torch.from_numpy(dequantize(w.blocks.contiguous().numpy(), GGMLQuantizationType[w.kind]))
    blocks = w.blocks.reshape(w.shape[0], -1, sizes(w.kind)[1]).contiguous()
    at = 4 * FLOATS_OF[w.kind]
    numbers = blocks[:, :, :at].contiguous().view(torch.float32).double()
    if w.kind == "int4":
        q = torch.cat([blocks[:, :, at:] & 15, blocks[:, :, at:] >> 4], dim=2)
        found = numbers[:, :, :1] * q + numbers[:, :, 1:]
    else:
        found = blocks[:, :, at:].view(torch.int8) * numbers.repeat_interleave(32 // FLOATS_OF[w.kind], dim=2)
    return found.float().flatten(1)
