"""Results that no cache holds are written past the caches: the bits are those of smaller pieces."""

from __future__ import annotations

import pytest
import torch

from tests.backends.test_native import SETS, core, native

WIDTH, PIECE = 1024, 1000  # numbers of a row; rows of a piece that the cache keeps
BYTES = 33 << 20  # more than csrc/cpu/non_temporal.h thinks a cache keeps

names = pytest.mark.parametrize("name", SETS)


@names
@pytest.mark.parametrize("width", [WIDTH, WIDTH - 7])
def test_rms_norm(name: str, width: int) -> None:
    x, w = torch.randn(BYTES // 4 // width + 1, width), torch.randn(width)
    with core.using(name):
        whole = native.rms_norm(x, w, 1e-6, out=torch.empty_like(x))
        for start in range(0, len(x), PIECE):
            piece = slice(start, start + PIECE)
            assert torch.equal(whole[piece], native.rms_norm(x[piece], w, 1e-6, out=torch.empty_like(x[piece])))


@names
def test_swiglu(name: str) -> None:
    gate_up = torch.randn(BYTES // 4 // WIDTH + 1, 2 * WIDTH)
    with core.using(name):
        whole = native.swiglu(gate_up, out=torch.empty(len(gate_up), WIDTH))
        for start in range(0, len(gate_up), PIECE):
            piece = gate_up[start : start + PIECE]
            assert torch.equal(whole[start : start + PIECE], native.swiglu(piece, out=torch.empty(len(piece), WIDTH)))


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embed(name: str, dtype: torch.dtype) -> None:
    count = BYTES // dtype.itemsize // WIDTH + 1
    rows, table = torch.randn(9, WIDTH), torch.randn(50, WIDTH).to(dtype)
    ids, shown = torch.randint(0, 50, (count,)), torch.randint(-9, 9, (count,)).clamp_min(-1)
    expected = torch.where(shown[:, None] >= 0, rows.to(dtype)[shown.clamp_min(0)], table[ids])
    with core.using(name):
        found = native.embed(rows, table, ids, shown, out=torch.empty(count, WIDTH, dtype=dtype))
    assert torch.equal(found, expected)
