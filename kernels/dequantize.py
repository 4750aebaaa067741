# mypy: allow-untyped-defs
"""A quantised matrix as a plain one, for products of many rows, which cuBLAS takes from there.

    w = scale · (q − zero) + offset, per group of consecutive columns              (packing.py has the layout)

computed in fp32, as `PackedWeight.dequantize` does, and rounded once to the type of the result. The kernel reads and
writes every byte once; nothing else limits it.
"""

import torch
import triton
import triton.language as tl

from . import checks, launch
from .packing import PackedWeight
from .quantized_linear import check_layout, packed_constants


@triton.jit
def _plain(b_q, scales_ptr, offsets_ptr, o_n, m_n, first, groups, scales_row, ZERO: tl.constexpr,
           OFFSETS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """W's tile [BLOCK_N, BLOCK_K] in fp32 from its quants; first: the tile's first column, groups: of a (half) row."""
    IN_TILE: tl.constexpr = BLOCK_K // GROUP if BLOCK_K > GROUP else 1
    WIDTH: tl.constexpr = BLOCK_K // IN_TILE
    # [BLOCK_N, IN_TILE]
    o_g = first // GROUP + tl.arange(0, IN_TILE)
    m_g = m_n[:, None] & (o_g < groups)[None, :]
    at = (o_n * scales_row)[:, None] + o_g[None, :]
    b_scale = tl.load(scales_ptr + at, mask=m_g, other=0.0).to(tl.float32)
    # [BLOCK_N, IN_TILE, WIDTH]
    b_w = (tl.reshape(b_q, (BLOCK_N, IN_TILE, WIDTH)).to(tl.float32) - ZERO) * b_scale[:, :, None]
    if OFFSETS:
        b_w += tl.load(offsets_ptr + at, mask=m_g, other=0.0).to(tl.float32)[:, :, None]
    return tl.reshape(b_w, (BLOCK_N, BLOCK_K))


@triton.jit
def dequantize_kernel(
    packed_ptr, scales_ptr, offsets_ptr, w_ptr,
    N, K, columns, groups, packed_row, scales_row, w_row,
    INT4: tl.constexpr, ZERO: tl.constexpr, OFFSETS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, blocks of packed columns): a tile of W, for int4 the two whose columns share bytes."""
    # [BLOCK_N], [BLOCK_K]
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCK_K
    o_k = first + tl.arange(0, BLOCK_K)
    m_n = o_n < N
    m_q = m_n[:, None] & (o_k < columns)[None, :]
    b_q = tl.load(packed_ptr + (o_n * packed_row)[:, None] + o_k[None, :], mask=m_q, other=0)
    p_w = w_ptr + (o_n * w_row)[:, None] + o_k[None, :]
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    half = groups // 2 if INT4 else groups
    b_low = b_q & 15 if INT4 else b_q
    b_w = _plain(
        b_low, scales_ptr, offsets_ptr, o_n, m_n, first, half, scales_row, ZERO, OFFSETS, GROUP, BLOCK_N, BLOCK_K
    )
    tl.store(p_w, b_w.to(dtype), mask=m_q & (o_k < K)[None, :])
    if INT4:
        b_w = _plain(
            b_q >> 4, scales_ptr + half, offsets_ptr + half, o_n, m_n, first, half, scales_row,
            ZERO, OFFSETS, GROUP, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        tl.store(p_w + columns, b_w.to(dtype), mask=m_q & (columns + o_k < K)[None, :])


def dequantize(weight: PackedWeight, *, out: torch.Tensor) -> torch.Tensor:
    """out [N, K] = W, float32, float16 or bfloat16, with contiguous rows.

    Raises ValueError where shapes or types do not fit.
    """
    checks.shape("out", out, weight.shape)
    checks.floating(out=out)
    checks.writable(out=out)
    check_layout(weight)
    if out.stride(1) != 1 and weight.shape[1] > 1:
        raise ValueError(f"out must have contiguous rows, not strides {out.stride()}")
    (n, k), columns = weight.shape, weight.packed.shape[1]
    options = launch.options("dequantize", launch.architecture(out.device), dtype=out.dtype, width=columns)
    block, group = options["BLOCK_K"], weight.group
    if max(block, group) % min(block, group):
        raise ValueError(f"tiles of {block} columns and groups of {group} must divide one another")
    offsets = weight.scales if weight.offsets is None else weight.offsets
    launch.run(
        dequantize_kernel, (triton.cdiv(n, options["BLOCK_N"]), triton.cdiv(columns, block)),
        weight.packed, weight.scales, offsets, out,
        n, k, columns, weight.scales.shape[1], weight.packed.stride(0), weight.scales.stride(0), out.stride(0),
        **packed_constants(weight), **options,
    )  # fmt: skip
    return out
