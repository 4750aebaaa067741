"""The harness itself: each helper must notice the fault it is there for."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from .harness import (
    DEVICE,
    INTEGER_POISON,
    INTERPRETED,
    LAYOUTS,
    assert_written,
    awkward_sizes,
    check_canaries,
    grid_orders,
    guarded,
    guarded_copy,
    laid_out,
    layouts,
    normal,
    same_bits,
    strides_of,
    three_way,
)


@triton.jit
def _scale(x_ptr, y_ptr, rows, width, x_row, x_col, y_row, y_col, factor, extra, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    m_n = o_n < width + extra
    x = tl.load(x_ptr + row * x_row + o_n * x_col, mask=o_n < width, other=0.0)
    tl.store(y_ptr + row * y_row + o_n * y_col, x * factor, mask=m_n)


@triton.jit
def _order_matters(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    before = tl.load(y_ptr)
    tl.store(y_ptr, before * 0.5 + tl.program_id(0).to(tl.float32) + tl.sum(tl.load(x_ptr + o, mask=o < n, other=0.0)))


def scale(x: torch.Tensor, out: torch.Tensor, extra: int = 0) -> torch.Tensor:
    rows, width = x.shape
    block = triton.next_power_of_2(width + extra)
    _scale[(rows,)](x, out, rows, width, *x.stride(), *out.stride(), 3.0, extra, BLOCK=block)
    return out


@settings(deadline=None)
@given(st.integers(0, 2**31), awkward_sizes(1, 9), awkward_sizes(1, 40), layouts(), layouts(expanded=False))
def test_a_right_kernel_passes(seed: int, rows: int, width: int, layout: str, out_layout: str) -> None:
    x = laid_out(normal(seed, (rows, width)), layout)  # type: ignore[arg-type]
    strides = strides_of((rows, width), out_layout)  # type: ignore[arg-type]
    out = same_bits(lambda: scale(x, guarded((rows, width), strides=strides)))
    three_way(out, x * 3, x.double() * 3, by="element")
    check_canaries()


@pytest.mark.parametrize("layout", ["contiguous", "wide_rows", "stepped"])
def test_a_store_beyond_the_row_is_seen(layout: str) -> None:
    x = laid_out(normal(0, (3, 8)), layout)  # type: ignore[arg-type]
    scale(x, guarded((3, 8), strides=strides_of((3, 8), layout)), extra=1)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="overwritten"):
        check_canaries()


def test_a_load_beyond_the_end_is_seen() -> None:
    x = guarded_copy(normal(0, (1, 8)))
    out = guarded((1, 9))
    _scale[(1,)](x, out, 1, 9, *x.stride(), *out.stride(), 1.0, 0, BLOCK=16)
    assert out[0, 8].isnan()


@pytest.mark.skipif(not INTERPRETED, reason="a GPU walks its grid in an order of its own")
def test_dependence_on_the_grid_order_is_seen() -> None:
    x = guarded_copy(normal(0, (4,)))

    def run() -> torch.Tensor:
        out = guarded((1,), fill=0.0)
        _order_matters[(5,)](x, out, 4, BLOCK=4)
        return out

    with pytest.raises(AssertionError, match="grid backwards"):
        same_bits(run)


def test_every_program_runs_once_in_every_order() -> None:
    @triton.jit
    def mark(y_ptr, ny, nz):
        at = (tl.program_id(0) * ny + tl.program_id(1)) * nz + tl.program_id(2)
        tl.store(y_ptr + at, tl.load(y_ptr + at) + 1)

    for _ in grid_orders():
        y = guarded((2, 3, 5), torch.int32, fill=0)
        mark[(2, 3, 5)](y, 3, 5)
        assert (y == 1).all()


def test_unwritten_elements_are_seen() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int64):
        with pytest.raises(AssertionError, match="never written"):
            assert_written(guarded((3,), dtype))
    assert guarded((1,), torch.int64).item() == INTEGER_POISON


def test_three_way_rule() -> None:
    truth = torch.ones(10, dtype=torch.float64, device=DEVICE)
    plain = truth.clone()
    plain[0] += 1e-3
    near, far = truth.clone(), truth.clone()
    near[0], far[1] = 1.001, 1.01
    for by in ("norm", "max", "element"):
        three_way(near, plain, truth, by=by, tolerance=1e-9)  # type: ignore[arg-type]
        with pytest.raises(AssertionError, match="exceeds"):
            three_way(far, plain, truth, by=by, tolerance=1e-9)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="exceeds"):
        three_way(plain.flip(0), plain, truth, by="element", tolerance=1e-9)
    infinite = truth.clone()
    infinite[3] = -torch.inf
    three_way(infinite, infinite, infinite)
    with pytest.raises(AssertionError, match="infinite"):
        three_way(truth, infinite, infinite)
    with pytest.raises(AssertionError, match="NaN"):
        three_way(truth * torch.nan, truth, truth)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_values(layout: str) -> None:
    x = normal(1, (3, 4, 5), torch.float16)
    y = laid_out(x, layout)  # type: ignore[arg-type]
    assert y.device == DEVICE
    assert torch.equal(y, x[:1].expand(3, 4, 5) if layout == "expanded" else x)
    check_canaries()
