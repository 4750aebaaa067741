# mypy: allow-untyped-defs
"""Products with a frozen quantised matrix: x Wᵀ (+ b) and dy W, dequantised in registers.

    w = scale · (q − zero) + offset, per group of consecutive columns              (packing.py has the layout)
    forward     y [M, N] = x [M, K] Wᵀ + b            backward     dx [M, K] = dy [M, N] W

Both directions read the same stored bytes once per tile of rows of x, and nothing else of W ever exists in memory. w is
computed in fp32, rounded to x's type and multiplied on the matrix cores with fp32 accumulation: what a product with
the dequantised matrix would give, bit for bit up to the order of the sums.

int4 stores column j and column K′/2 + j of a row in one byte, so a tile of bytes is two tiles of whole, consecutive
columns: the forward runs two products per tile (the two halves of x's columns), the backward keeps two accumulators
(the two halves of dx's columns), and no value changes lanes to be unpacked. The forward computes yᵀ = W xᵀ: the first
operand of Hopper's matrix instructions may come from registers, where W has just been dequantised, and a decode step's
few rows of x need no more than 16 columns of the tile.
"""

import torch
import triton
import triton.language as tl

from . import checks, launch
from .packing import PackedWeight


@triton.jit
def dequantized_tile(
    b_q, scales_ptr, offsets_ptr, o_n, m_n, first, groups, scales_row,
    ZERO: tl.constexpr, OFFSETS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W's tile [ROWS, BLOCK_K] in fp32 from its quants; first: the tile's first column, groups: how many a row has."""
    IN_TILE: tl.constexpr = BLOCK_K // GROUP if BLOCK_K > GROUP else 1
    b_q = b_q.to(tl.float32) - ZERO
    p_scale = o_n * scales_row + first // GROUP
    if IN_TILE == 1:
        # [ROWS, 1]
        b_scale = tl.load(scales_ptr + p_scale, mask=m_n, other=0.0).to(tl.float32)[:, None]
        b_w = b_q * b_scale
        if OFFSETS:
            b_w += tl.load(offsets_ptr + p_scale, mask=m_n, other=0.0).to(tl.float32)[:, None]
        return b_w
    else:
        # [ROWS, IN_TILE]
        o_g = tl.arange(0, IN_TILE)
        m_g = m_n[:, None] & (first // GROUP + o_g < groups)[None, :]
        b_scale = tl.load(scales_ptr + p_scale[:, None] + o_g[None, :], mask=m_g, other=0.0).to(tl.float32)
        # [ROWS, IN_TILE, GROUP]
        b_w = tl.reshape(b_q, (ROWS, IN_TILE, GROUP)) * b_scale[:, :, None]
        if OFFSETS:
            b_offset = tl.load(offsets_ptr + p_scale[:, None] + o_g[None, :], mask=m_g, other=0.0).to(tl.float32)
            b_w += b_offset[:, :, None]
        return tl.reshape(b_w, (ROWS, BLOCK_K))


@triton.jit(do_not_specialize=["M"])
def quantized_linear_kernel(
    x_ptr, packed_ptr, scales_ptr, offsets_ptr, bias_ptr, y_ptr,
    M, N, K, columns, groups,
    x_row, x_col, packed_row, scales_row, bias_col, y_row, y_col,
    INT4: tl.constexpr, ZERO: tl.constexpr, OFFSETS: tl.constexpr, BIAS: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y = x Wᵀ (+ b). columns: packed columns of a row; groups: scales of a row."""
    i_m, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    # [BLOCK_M], [BLOCK_N], [BLOCK_K]
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_n = o_m < M, o_n < N
    p_x = x_ptr + (o_m * x_row)[:, None]
    p_packed = packed_ptr + (o_n * packed_row)[:, None]
    # [BLOCK_N, BLOCK_M]: yᵀ
    b_y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first in range(0, columns, BLOCK_K):
        o_c = first + o_k
        # [BLOCK_N, BLOCK_K]
        b_q = tl.load(p_packed + o_c[None, :], mask=m_n[:, None] & (o_c < columns)[None, :], other=0)
        # [BLOCK_M, BLOCK_K]
        b_x = tl.load(p_x + (o_c.to(tl.int64) * x_col)[None, :], mask=m_m[:, None] & (o_c < K)[None, :], other=0.0)
        if INT4:
            o_h = columns + o_c
            m_h = m_m[:, None] & ((o_h < K) & (o_c < columns))[None, :]
            b_x2 = tl.load(p_x + (o_h.to(tl.int64) * x_col)[None, :], mask=m_h, other=0.0)
            b_w = dequantized_tile(
                b_q & 15, scales_ptr, offsets_ptr, o_n, m_n, first, groups // 2, scales_row,
                ZERO, OFFSETS, GROUP, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            b_y = tl.dot(b_w.to(b_x.dtype), tl.trans(b_x), b_y, input_precision=PRECISION)
            b_w = dequantized_tile(
                b_q >> 4, scales_ptr + groups // 2, offsets_ptr + groups // 2, o_n, m_n, first, groups // 2, scales_row,
                ZERO, OFFSETS, GROUP, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            b_y = tl.dot(b_w.to(b_x.dtype), tl.trans(b_x2), b_y, input_precision=PRECISION)
        else:
            b_w = dequantized_tile(
                b_q, scales_ptr, offsets_ptr, o_n, m_n, first, groups, scales_row,
                ZERO, OFFSETS, GROUP, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            b_y = tl.dot(b_w.to(b_x.dtype), tl.trans(b_x), b_y, input_precision=PRECISION)
    if BIAS:
        b_y += tl.load(bias_ptr + o_n * bias_col, mask=m_n, other=0.0).to(tl.float32)[:, None]
    tl.store(y_ptr + (o_m * y_row)[:, None] + (o_n * y_col)[None, :], tl.trans(b_y), mask=m_m[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["M"])
def quantized_linear_backward_kernel(
    dy_ptr, packed_ptr, scales_ptr, offsets_ptr, dx_ptr,
    M, N, K, columns, groups,
    dy_row, dy_col, packed_row, scales_row, dx_row, dx_col,
    INT4: tl.constexpr, ZERO: tl.constexpr, OFFSETS: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of dx = dy W (int4: the two tiles whose columns share bytes)."""
    i_m, i_k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    # [BLOCK_M], [BLOCK_K]
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first = i_k * BLOCK_K
    o_c = first + tl.arange(0, BLOCK_K)
    m_m, m_c = o_m < M, o_c < columns
    p_dy = dy_ptr + (o_m * dy_row)[:, None]
    # [BLOCK_M, BLOCK_K]
    b_dx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    b_dx2 = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, N, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        m_n = o_n < N
        # [BLOCK_M, BLOCK_N], [BLOCK_N, BLOCK_K]
        b_dy = tl.load(p_dy + (o_n * dy_col)[None, :], mask=m_m[:, None] & m_n[None, :], other=0.0)
        p_packed = packed_ptr + (o_n * packed_row)[:, None] + o_c[None, :]
        b_q = tl.load(p_packed, mask=m_n[:, None] & m_c[None, :], other=0)
        if INT4:
            b_w = dequantized_tile(
                b_q & 15, scales_ptr, offsets_ptr, o_n, m_n, first, groups // 2, scales_row,
                ZERO, OFFSETS, GROUP, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            b_dx = tl.dot(b_dy, b_w.to(b_dy.dtype), b_dx, input_precision=PRECISION)
            b_w = dequantized_tile(
                b_q >> 4, scales_ptr + groups // 2, offsets_ptr + groups // 2, o_n, m_n, first, groups // 2, scales_row,
                ZERO, OFFSETS, GROUP, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            b_dx2 = tl.dot(b_dy, b_w.to(b_dy.dtype), b_dx2, input_precision=PRECISION)
        else:
            b_w = dequantized_tile(
                b_q, scales_ptr, offsets_ptr, o_n, m_n, first, groups, scales_row,
                ZERO, OFFSETS, GROUP, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            b_dx = tl.dot(b_dy, b_w.to(b_dy.dtype), b_dx, input_precision=PRECISION)
    p_dx = dx_ptr + (o_m * dx_row)[:, None]
    m_k = m_c & (o_c < K)
    tl.store(p_dx + (o_c.to(tl.int64) * dx_col)[None, :], b_dx, mask=m_m[:, None] & m_k[None, :])
    if INT4:
        o_h = columns + o_c
        m_h = m_c & (o_h < K)
        tl.store(p_dx + (o_h.to(tl.int64) * dx_col)[None, :], b_dx2, mask=m_m[:, None] & m_h[None, :])


def quantized_linear(
    x: torch.Tensor, weight: PackedWeight, *, out: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """out [M, N] = x [M, K] Wᵀ (+ bias [N]); x, out, bias float32, float16 or bfloat16, any strides.

    W is dequantised to x's type, products accumulate in fp32. Raises ValueError where shapes or types do not fit.
    """
    rows, k = x.shape
    n = weight.shape[0]
    _check(weight, k, x, out, (rows, n))
    if bias is not None:
        checks.shape("bias", bias, (n,))
        checks.floating(bias=bias)
    options = _options("quantized_linear", x, weight)
    b = x if bias is None else bias
    grid = (triton.cdiv(rows, options["BLOCK_M"]), triton.cdiv(n, options["BLOCK_N"]))
    offsets = weight.scales if weight.offsets is None else weight.offsets
    launch.run(
        quantized_linear_kernel, grid,
        x, weight.packed, weight.scales, offsets, b, out,
        rows, n, k, weight.packed.shape[1], weight.scales.shape[1],
        *x.stride(), weight.packed.stride(0), weight.scales.stride(0), b.stride(0), *out.stride(),
        BIAS=bias is not None, PRECISION="ieee", **packed_constants(weight), **options,
    )  # fmt: skip
    return out


def quantized_linear_backward(dy: torch.Tensor, weight: PackedWeight, *, out: torch.Tensor) -> torch.Tensor:
    """out [M, K] = dy [M, N] W; dy (may be expanded), out float32, float16 or bfloat16, any strides.

    W is dequantised to dy's type, products accumulate in fp32. Raises ValueError where shapes or types do not fit.
    """
    rows, n = dy.shape
    k = weight.shape[1]
    _check(weight, k, dy, out, (rows, k))
    checks.shape("dy", dy, (rows, weight.shape[0]))
    options = _options("quantized_linear_backward", dy, weight)
    columns = weight.packed.shape[1]
    grid = (triton.cdiv(rows, options["BLOCK_M"]), triton.cdiv(columns, options["BLOCK_K"]))
    offsets = weight.scales if weight.offsets is None else weight.offsets
    launch.run(
        quantized_linear_backward_kernel, grid,
        dy, weight.packed, weight.scales, offsets, out,
        rows, n, k, columns, weight.scales.shape[1],
        *dy.stride(), weight.packed.stride(0), weight.scales.stride(0), *out.stride(),
        PRECISION="ieee", **packed_constants(weight), **options,
    )  # fmt: skip
    return out


def _check(weight: PackedWeight, k: int, x: torch.Tensor, out: torch.Tensor, expected: tuple[int, int]) -> None:
    if weight.shape[1] != k:
        raise ValueError(f"x has {k} columns, but the weight has {weight.shape[1]}")
    if weight.offsets is not None and weight.offsets.stride() != weight.scales.stride():
        raise ValueError("the weight's offsets must be laid out like its scales")
    checks.shape("out", out, expected)
    checks.floating(x=x, out=out)
    checks.writable(out=out)


def _options(name: str, x: torch.Tensor, weight: PackedWeight) -> launch.Options:
    arch = launch.architecture(x.device)
    options = launch.options(name, arch, dtype=x.dtype, group=weight.group, rows=len(x))
    block, group = options["BLOCK_K"], weight.group
    if max(block, group) % min(block, group):
        raise ValueError(f"BLOCK_K {block} and the group size {group} must divide one another")
    return options


def packed_constants(weight: PackedWeight) -> dict[str, object]:
    """The constants that say how a weight is stored."""
    int4 = weight.kind == "int4"
    return {
        "INT4": int4, "ZERO": 8 if int4 and weight.offsets is None else 0, "OFFSETS": weight.offsets is not None,
        "GROUP": weight.group,
    }  # fmt: skip
