"""GGUF's types that csrc/ has no product for, brought to the narrowest that it has without losing a bit.

Their elements are a scale times one of a few whole numbers, which stand in a table of vectors (IQ1, IQ2, IQ3) or are
the values of a small float type (MXFP4, NVFP4). The gguf package decodes them. A group's scale and whole numbers are
found again from the decoded values, and kept only if they give these values bit for bit.
"""

from __future__ import annotations

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from embedgrad.model.quantised import BlockWeight

_IQ2, _IQ3_XXS, _IQ1, _FP4 = (8, 25, 43), (4, 12, 20, 28, 36, 44, 52, 62), (1, 7, 9), (1, 2, 3, 4, 6, 8, 12)
_GROUPS: dict[str, tuple[int, tuple[int, ...]]] = {
    "IQ2_XXS": (32, _IQ2), "IQ2_XS": (16, _IQ2), "IQ2_S": (16, _IQ2), "IQ3_XXS": (32, _IQ3_XXS),
    "IQ3_S": (32, tuple(range(1, 16, 2))), "IQ1_S": (32, _IQ1), "IQ1_M": (16, _IQ1), "MXFP4": (32, _FP4),
    "NVFP4": (16, _FP4),
}  # fmt: skip
"""Columns that share a scale, and the magnitudes of the whole numbers (of IQ1 in eighths)."""
_TERNARY = ("TQ1_0", "TQ2_0")  # −1, 0 and 1 times a scale for 256 columns
NARROWED = (*_GROUPS, *_TERNARY)
"""The types that `narrowed` takes."""
_AT_ONCE = 1 << 22  # elements that are decoded at once


def narrowed(kind: str, blocks: Tensor, shape: tuple[int, int]) -> BlockWeight | None:
    """The matrix [N, K] of blocks [N, bytes per matrix row] of a type of NARROWED: int8, int8_16 or Q2_K.

    None where its values are not a scale times whole numbers (numbers that are not finite).
    """
    rows, columns = shape
    target = "Q2_K" if kind in _TERNARY else "int8" if _GROUPS[kind][0] == 32 else "int8_16"
    found = []
    step = max(1, _AT_ONCE // max(1, columns))
    for start in range(0, rows, step):
        values = _decoded(kind, blocks[start : start + step], columns)
        part = _ternary(values) if kind in _TERNARY else _whole_numbers(values, *_GROUPS[kind])
        if part is None:
            return None
        found.append(part)
    return BlockWeight(target, torch.cat(found), shape)


def _decoded(kind: str, blocks: Tensor, columns: int) -> Tensor:
    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    flat = blocks.contiguous().view(-1, size)
    return torch.from_numpy(dequantize(flat.numpy(), GGMLQuantizationType[kind])).view(-1, columns)


def _whole_numbers(values: Tensor, group: int, magnitudes: tuple[int, ...]) -> Tensor | None:
    """Blocks of int8 or int8_16: the scales of 32 columns in float32, then their elements."""
    grouped = values.unflatten(1, (-1, group))
    scales, q = torch.zeros(grouped.shape[:2]), torch.zeros(grouped.shape, dtype=torch.int8)
    largest = grouped.abs().amax(2)
    open_ = largest != 0
    for magnitude in reversed(magnitudes):
        rest = grouped[open_]
        if not len(rest):
            break
        scale = largest[open_] / magnitude
        whole = (rest / scale[:, None]).round()
        fits = (whole * scale[:, None] == rest).all(1)
        at = open_.nonzero()[fits]
        scales[at[:, 0], at[:, 1]], q[at[:, 0], at[:, 1]] = scale[fits], whole[fits].to(torch.int8)
        open_[at[:, 0], at[:, 1]] = False
    if bool(open_.any()):
        return None
    of_block = 32 // group
    parts = (scales.view(len(values), -1, of_block), q.view(len(values), -1, 32))
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=2).flatten(1)


def _ternary(values: Tensor) -> Tensor | None:
    """Blocks of Q2_K: w = d · 1 · q − d · 1 with q from 0 to 3."""
    grouped = values.unflatten(1, (-1, 256))
    largest = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))[:, :, 0]
    halves = (2 * grouped.abs() == largest[:, :, None].abs()).any(2)  # q = 3 can be read, though nobody writes it
    d = torch.where(halves, largest / 2, largest)
    q = torch.where(d[:, :, None] == 0, 1.0, grouped / d[:, :, None] + 1)
    fits = torch.equal(d.half().float(), d) and bool(((q >= 0) & (q == q.round()) & (q <= 3)).all())
    return _q2_k(q.to(torch.uint8), d.half()) if fits else None


def _q2_k(q: Tensor, d: Tensor) -> Tensor:
    """Blocks with the elements q [N, blocks, 256], all sub-scales 1 and both numbers d [N, blocks]."""
    pairs = q.view(*d.shape, 2, 4, 32)  # in each half of a block, bits 2 k of byte i are those of column 32 k + i
    packed = pairs[:, :, :, 0].clone()
    for k in range(1, 4):
        packed |= pairs[:, :, :, k] << 2 * k
    ones = torch.full((*d.shape, 16), 0x11, dtype=torch.uint8)
    numbers = torch.stack([d, d], dim=2).view(torch.uint8)
    return torch.cat([ones, packed.flatten(2), numbers], dim=2).flatten(1)
