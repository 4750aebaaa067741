"""Types without a product of their own are brought to one that has, without losing a bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from embedgrad.model.narrowed import NARROWED, narrowed
from embedgrad.model.native_matrices import is_built
from tests.model.blocks import sizes

if not is_built():
    pytest.skip("csrc/ is not built", allow_module_level=True)

HALF_AT = {"IQ2_XXS": 0, "IQ2_XS": 0, "IQ2_S": 0, "IQ3_XXS": 0, "IQ3_S": 0, "IQ1_S": 0, "TQ1_0": 52, "TQ2_0": 64}
"""The byte of a block at which its float16 begins."""


def random_blocks(kind: str, rows: int, count: int, seed: int) -> Tensor:
    """[rows, bytes] of blocks whose numbers are finite; one of the scales is 0."""
    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, (rows, count, size), dtype=np.uint8)
    if kind in HALF_AT:
        numbers = draw.normal(size=(rows, count, 1)).astype(np.float16)
        numbers[0, 0] = 0
        blocks[:, :, HALF_AT[kind] : HALF_AT[kind] + 2] = numbers.view(np.uint8)
        if kind == "TQ2_0":  # two bits for each of −1, 0 and 1; the last block has some for 2, too
            blocks[:, :-1, :64] &= ~(blocks[:, :-1, :64] & 0xAA) >> 1 | 0xAA
    elif kind == "IQ1_M":  # the high nibbles of four numbers at the end
        blocks[:, :, 55] = blocks[:, :, 55] & 15 | 0x20
    elif kind == "MXFP4":
        blocks[:, :, 0] = draw.integers(100, 140, (rows, count))
    elif kind == "NVFP4":
        blocks[:, :, :4] = draw.integers(0, 0x70, (rows, count, 4))
    return torch.from_numpy(blocks.reshape(rows, -1))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NARROWED), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**31))
def test_every_bit_is_kept(kind: str, rows: int, count: int, seed: int) -> None:
    blocks = random_blocks(kind, rows, count, seed)
    values = torch.from_numpy(dequantize(blocks.numpy(), GGMLQuantizationType[kind]))
    w = narrowed(kind, blocks, (rows, values.shape[1]))
    assert w is not None
    columns, size = sizes(w.kind)
    assert w.blocks.shape == (rows, values.shape[1] // columns * size)
    assert torch.equal(w.dequantize(), values)


def test_numbers_that_are_not_finite_stay_as_they_are() -> None:
    blocks = random_blocks("IQ2_XXS", 3, 2, 0)
    blocks[1, 0:2] = torch.tensor([0, 0x7C], dtype=torch.uint8)  # an infinite scale
    assert narrowed("IQ2_XXS", blocks, (3, 512)) is None
