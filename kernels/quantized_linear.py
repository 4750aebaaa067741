# mypy: allow-untyped-defs
"""Products of a few rows with a frozen quantised matrix: x Wᵀ (+ b) and dy W, straight from the stored bytes.

    w = scale · (q − zero) + offset, per group of consecutive columns              (packing.py has the layout)
    forward     y [M, N] = x [M, K] Wᵀ + b            backward     dx [M, K] = dy [M, N] W

For many rows dequantising the matrix once and cuBLAS are faster (dequantize.py, FUSED_ROWS). For few rows the time is
that of reading W, if little is done to each element. So the matrix cores multiply whole numbers, q − zero, which every
16-bit type holds exactly, and a group's scale multiplies something that has fewer numbers than W has elements:

    forward     y += scale ⊙ ((q − zero) xᵀ) + offset ⊗ Σ x     over the groups of a row, with fp32 sums
    backward    dx += (dy ⊙ scale) (q − zero) + Σ dy ⊙ offset   over the rows of W; dy ⊙ scale is rounded to dy's type
                (in float16 scale ⊙ (q − zero) is, because dy ⊙ scale may be too small for it)

The reduction is shared out over programs where a matrix has too few tiles to keep a GPU busy; each leaves fp32 partial
sums, and a second kernel adds them in a fixed order. No atomics, equal bits in every run.

int4 stores column j and column K′/2 + j of a row in one byte, so a tile of bytes is two tiles of whole, consecutive
columns: the forward runs two products per tile (the two halves of x's columns), the backward keeps two accumulators
(the two halves of dx's columns), and no value changes lanes to be unpacked. No product is chained to another one's
accumulator within a step, which Triton 3.6 to 3.8 gets wrong on Blackwell (triton #10821). The forward computes
yᵀ = W xᵀ: the first operand of Hopper's matrix instructions may come from registers, where q − zero has just been made,
and a decode step's few rows of x need no more than 16 columns of the tile.
"""

import torch
import triton
import triton.language as tl

from . import checks, launch
from .packing import PackedWeight

FUSED_ROWS = 64
"""Rows up to which these kernels are used. On an H100 the fused int4 kernel of commit def83d3 took 36 µs with 16 rows
of x at 17,920 × 1,536, and 173 with 512, where cuBLAS takes 48 and dequantising some 23."""
NARROWEST_GROUP = 16  # columns: the least that a matrix instruction sums over


@triton.jit
def whole_numbers(b_q, DTYPE: tl.constexpr, ZERO: tl.constexpr, INT4: tl.constexpr):
    """q − zero in the product's type, exactly."""
    if tl.bfloat16 == DTYPE and INT4:
        # The byte becomes the last bits of 128 + q: one bit operation, where a conversion from integers takes several.
        return (b_q.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - (128 + ZERO)
    else:
        return b_q.to(DTYPE) - ZERO


@triton.jit
def _forward_step(b_y, b_w, b_scale, b_offset, p_x, o_k, m_m, K, x_col, OFFSETS: tl.constexpr):
    """yᵀ [BLOCK_N, BLOCK_M] with the columns o_k of one group added; b_w: their whole numbers [BLOCK_N, BLOCK_K]."""
    # [BLOCK_M, BLOCK_K]
    b_x = tl.load(p_x + (o_k.to(tl.int64) * x_col)[None, :], mask=m_m[:, None] & (o_k < K)[None, :], other=0.0)
    b_y += b_scale.to(tl.float32)[:, None] * tl.dot(b_w, tl.trans(b_x), input_precision="ieee")
    if OFFSETS:
        b_y += b_offset.to(tl.float32)[:, None] * tl.sum(b_x.to(tl.float32), 1)[None, :]
    return b_y


@triton.jit
def _scales(p_scale, p_offset, at, OFFSETS: tl.constexpr):
    """Scales and offsets of a tile of rows. Two bytes are too few for an asynchronous copy, by which the other
    operands come. So they are loaded a step before they are needed."""
    b_scale = tl.load(p_scale + at)
    b_offset = b_scale
    if OFFSETS:
        b_offset = tl.load(p_offset + at)
    return b_scale, b_offset


@triton.jit
def _store(b_y, out_ptr, bias_ptr, add_ptr, o_m, o_n, m_m, m_n, out_row, out_col, bias_col, add_row, add_col,
           BIAS: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    """b_y [rows, columns] + bias + add, rounded once."""
    m_out = m_m[:, None] & m_n[None, :]
    if BIAS:
        b_y += tl.load(bias_ptr + o_n * bias_col, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if ADD:
        p_add = add_ptr + (o_m * add_row)[:, None] + (o_n * add_col)[None, :]
        b_y += tl.load(p_add, mask=m_out, other=0.0).to(tl.float32)
    p_out = out_ptr + (o_m * out_row)[:, None] + (o_n * out_col)[None, :]
    tl.store(p_out, b_y.to(out_ptr.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["M", "steps"])
def quantized_linear_kernel(
    x_ptr, packed_ptr, scales_ptr, offsets_ptr, bias_ptr, add_ptr, y_ptr,
    M, N, K, columns, groups, steps,
    x_row, x_col, packed_row, scales_row, bias_col, add_row, add_col, y_split, y_row, y_col,
    INT4: tl.constexpr, ZERO: tl.constexpr, OFFSETS: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows of x, tiles of rows of W, splits): one tile of y from one split of `steps` tiles of columns.

    columns: packed columns of a row, groups: scales of a row. A tile of columns lies in one group.
    """
    i_m, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_s = tl.program_id(2)
    # [BLOCK_M], [BLOCK_N], [BLOCK_K]; rows of W beyond the last are computed as copies of it and not stored
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_row = tl.minimum(o_n, N - 1)
    m_m = o_m < M
    p_x = x_ptr + (o_m * x_row)[:, None]
    p_packed = packed_ptr + (o_row * packed_row)[:, None] + tl.arange(0, BLOCK_K)[None, :]
    p_scale, p_offset = scales_ptr + o_row * scales_row, offsets_ptr + o_row * scales_row
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    b_y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    b_y2 = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    begin, end = i_s * steps * BLOCK_K, tl.minimum((i_s + 1) * steps * BLOCK_K, columns)
    half = groups // 2 if INT4 else groups
    b_scale, b_offset = _scales(p_scale, p_offset, begin // GROUP, OFFSETS)
    b_scale2, b_offset2 = b_scale, b_offset
    if INT4:
        b_scale2, b_offset2 = _scales(p_scale, p_offset, half + begin // GROUP, OFFSETS)
    for first in range(begin, end, BLOCK_K):
        # [BLOCK_N, BLOCK_K]
        b_q = tl.load(p_packed + first)
        o_k = first + tl.arange(0, BLOCK_K)
        after = tl.minimum((first + BLOCK_K) // GROUP, half - 1)
        b_after, b_offset_after = _scales(p_scale, p_offset, after, OFFSETS)
        b_low = b_q & 15 if INT4 else b_q
        b_w = whole_numbers(b_low, dtype, ZERO, INT4)
        b_y = _forward_step(b_y, b_w, b_scale, b_offset, p_x, o_k, m_m, K, x_col, OFFSETS)
        b_scale, b_offset = b_after, b_offset_after
        if INT4:
            b_after, b_offset_after = _scales(p_scale, p_offset, half + after, OFFSETS)
            b_w = whole_numbers(b_q >> 4, dtype, ZERO, INT4)
            b_y2 = _forward_step(b_y2, b_w, b_scale2, b_offset2, p_x, columns + o_k, m_m, K, x_col, OFFSETS)
            b_scale2, b_offset2 = b_after, b_offset_after
    if INT4:
        b_y += b_y2
    _store(
        tl.trans(b_y), y_ptr + i_s.to(tl.int64) * y_split, bias_ptr, add_ptr, o_m, o_n, m_m, o_n < N,
        y_row, y_col, bias_col, add_row, add_col, BIAS, ADD,
    )  # fmt: skip


@triton.jit
def _backward_step(b_dx, b_sum, b_dy, b_w, b_scale, b_offset, OFFSETS: tl.constexpr):
    """dx [BLOCK_M, BLOCK_K] with some rows of W added, and Σ dy ⊙ offset [BLOCK_M] over them."""
    if b_dy.dtype == tl.float16:  # where dy ⊙ scale would be so small that float16 keeps few of its bits
        b_scaled = (b_w.to(tl.float32) * b_scale.to(tl.float32)[:, None]).to(tl.float16)
        b_dx = tl.dot(b_dy, b_scaled, b_dx, input_precision="ieee")
    else:
        b_scaled = (b_dy.to(tl.float32) * b_scale.to(tl.float32)[None, :]).to(b_dy.dtype)
        b_dx = tl.dot(b_scaled, b_w, b_dx, input_precision="ieee")
    if OFFSETS:
        b_sum += tl.sum(b_dy.to(tl.float32) * b_offset.to(tl.float32)[None, :], 1)
    return b_dx, b_sum


@triton.jit(do_not_specialize=["M", "steps"])
def quantized_linear_backward_kernel(
    dy_ptr, packed_ptr, scales_ptr, offsets_ptr, dx_ptr,
    M, N, K, columns, groups, steps,
    dy_row, dy_col, packed_row, scales_row, dx_split, dx_row, dx_col,
    INT4: tl.constexpr, ZERO: tl.constexpr, OFFSETS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows of dy, tiles of columns, splits): one tile of dx, for int4 the two whose columns share bytes,
    from one split of `steps` tiles of rows of W."""
    i_m, i_k, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    # [BLOCK_M], [BLOCK_K]
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_m = o_m < M
    at = i_k * BLOCK_K // GROUP
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    b_dx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    b_dx2 = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_sum2 = tl.zeros((BLOCK_M,), tl.float32)
    begin, end = i_s * steps * BLOCK_N, tl.minimum((i_s + 1) * steps * BLOCK_N, N)
    half = groups // 2
    o_row = tl.minimum(begin + tl.arange(0, BLOCK_N).to(tl.int64), N - 1)
    b_scale, b_offset = _scales(scales_ptr + at, offsets_ptr + at, o_row * scales_row, OFFSETS)
    b_scale2, b_offset2 = b_scale, b_offset
    if INT4:
        b_scale2, b_offset2 = _scales(scales_ptr + at + half, offsets_ptr + at + half, o_row * scales_row, OFFSETS)
    for start in range(begin, end, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        o_row = tl.minimum(o_n, N - 1)  # where dy is 0 beyond the last row, any row will do
        # [BLOCK_M, BLOCK_N], [BLOCK_N, BLOCK_K]
        p_dy = dy_ptr + (o_m * dy_row)[:, None] + (o_n * dy_col)[None, :]
        b_dy = tl.load(p_dy, mask=m_m[:, None] & (o_n < N)[None, :], other=0.0)
        b_q = tl.load(packed_ptr + (o_row * packed_row)[:, None] + o_k[None, :])
        o_after = tl.minimum(o_n + BLOCK_N, N - 1) * scales_row
        b_after, b_offset_after = _scales(scales_ptr + at, offsets_ptr + at, o_after, OFFSETS)
        b_low = b_q & 15 if INT4 else b_q
        b_w = whole_numbers(b_low, dtype, ZERO, INT4)
        b_dx, b_sum = _backward_step(b_dx, b_sum, b_dy, b_w, b_scale, b_offset, OFFSETS)
        b_scale, b_offset = b_after, b_offset_after
        if INT4:
            b_after, b_offset_after = _scales(scales_ptr + at + half, offsets_ptr + at + half, o_after, OFFSETS)
            b_w = whole_numbers(b_q >> 4, dtype, ZERO, INT4)
            b_dx2, b_sum2 = _backward_step(b_dx2, b_sum2, b_dy, b_w, b_scale2, b_offset2, OFFSETS)
            b_scale2, b_offset2 = b_after, b_offset_after
    dx_ptr += i_s.to(tl.int64) * dx_split
    p_dx = dx_ptr + (o_m * dx_row)[:, None] + (o_k.to(tl.int64) * dx_col)[None, :]
    tl.store(p_dx, (b_dx + b_sum[:, None]).to(dx_ptr.dtype.element_ty), mask=m_m[:, None] & (o_k < K)[None, :])
    if INT4:
        p_dx += columns.to(tl.int64) * dx_col
        m_dx = m_m[:, None] & (columns + o_k < K)[None, :]
        tl.store(p_dx, (b_dx2 + b_sum2[:, None]).to(dx_ptr.dtype.element_ty), mask=m_dx)


@triton.jit(do_not_specialize=["M", "splits"])
def quantized_linear_reduce_kernel(
    partial_ptr, bias_ptr, add_ptr, out_ptr,
    M, N, splits, bias_col, add_row, add_col, out_row, out_col,
    BIAS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows, blocks of columns): partial [splits, M, N] added in the order of the splits."""
    i_m = tl.program_id(0).to(tl.int64)
    # [1], [BLOCK]
    o_m = i_m + tl.arange(0, 1)
    o_n = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    b_y = tl.zeros((1, BLOCK), tl.float32)
    for i_s in range(0, splits):
        p_partial = partial_ptr + (tl.full((), i_s, tl.int64) * M + i_m) * N
        b_y += tl.load(p_partial + o_n, mask=m_n, other=0.0)[None, :]
    _store(
        b_y, out_ptr, bias_ptr, add_ptr, o_m, o_n, o_m < M, m_n,
        out_row, out_col, bias_col, add_row, add_col, BIAS, ADD,
    )  # fmt: skip


def quantized_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    *,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
) -> torch.Tensor:
    """out [M, N] = x [M, K] Wᵀ (+ bias [N]) (+ add [M, N]), rounded once.

    x (may be expanded), out, bias, add float32, float16 or bfloat16, any strides; `add` may be `out`. Sums are fp32. W
    enters exactly. Any M is right; see FUSED_ROWS. Raises ValueError where shapes or types do not fit.
    """
    (rows, k), n = x.shape, weight.shape[0]
    _check(weight, k, x, out, (rows, n))
    if bias is not None:
        checks.shape("bias", bias, (n,))
        checks.floating(bias=bias)
    if add is not None:
        checks.shape("add", add, (rows, n))
        checks.floating(add=add)
    if not rows:
        return out
    options = _options("quantized_linear", x, weight)
    programs, columns = options.pop("PROGRAMS"), weight.packed.shape[1]
    tiles = (triton.cdiv(rows, options["BLOCK_M"]), triton.cdiv(n, options["BLOCK_N"]))
    splits, steps = _splits(tiles[0] * tiles[1], columns // options["BLOCK_K"], programs)
    whole = splits == 1
    into = out if whole else torch.empty(splits, rows, n, dtype=torch.float32, device=x.device)
    b, a = (out if t is None else t for t in (bias, add))
    offsets = weight.scales if weight.offsets is None else weight.offsets
    launch.run(
        quantized_linear_kernel, (*tiles, splits),
        x, weight.packed, weight.scales, offsets, b, a, into,
        rows, n, k, columns, weight.scales.shape[1], steps,
        *x.stride(), weight.packed.stride(0), weight.scales.stride(0), b.stride(0), *a.stride(),
        0 if whole else rows * n, *into.stride()[-2:],
        BIAS=whole and bias is not None, ADD=whole and add is not None, **packed_constants(weight), **options,
    )  # fmt: skip
    return out if whole else _reduce(into, out, bias, add)


def quantized_linear_backward(dy: torch.Tensor, weight: PackedWeight, *, out: torch.Tensor) -> torch.Tensor:
    """out [M, K] = dy [M, N] W; dy (may be expanded), out float32, float16 or bfloat16, any strides.

    Sums are fp32; dy times a scale is rounded to dy's type, in which float16 may underflow. Any M is right; see
    FUSED_ROWS. Raises ValueError where shapes or types do not fit.
    """
    (rows, n), k = dy.shape, weight.shape[1]
    _check(weight, k, dy, out, (rows, k))
    checks.shape("dy", dy, (rows, weight.shape[0]))
    if not rows:
        return out
    options = _options("quantized_linear_backward", dy, weight)
    programs, columns = options.pop("PROGRAMS"), weight.packed.shape[1]
    tiles = (triton.cdiv(rows, options["BLOCK_M"]), columns // options["BLOCK_K"])
    splits, steps = _splits(tiles[0] * tiles[1], triton.cdiv(n, options["BLOCK_N"]), programs)
    into = out if splits == 1 else torch.empty(splits, rows, k, dtype=torch.float32, device=dy.device)
    offsets = weight.scales if weight.offsets is None else weight.offsets
    launch.run(
        quantized_linear_backward_kernel, (*tiles, splits),
        dy, weight.packed, weight.scales, offsets, into,
        rows, n, k, columns, weight.scales.shape[1], steps,
        *dy.stride(), weight.packed.stride(0), weight.scales.stride(0),
        0 if splits == 1 else rows * k, *into.stride()[-2:],
        **packed_constants(weight), **options,
    )  # fmt: skip
    return out if splits == 1 else _reduce(into, out, None, None)


def packed_constants(weight: PackedWeight) -> dict[str, object]:
    """The constants that say how a weight is stored."""
    int4 = weight.kind == "int4"
    return {
        "INT4": int4, "ZERO": 8 if int4 and weight.offsets is None else 0, "OFFSETS": weight.offsets is not None,
        "GROUP": weight.group,
    }  # fmt: skip


def check_layout(weight: PackedWeight) -> None:
    """Raises ValueError where a kernel cannot read the weight."""
    if weight.offsets is not None and weight.offsets.stride() != weight.scales.stride():
        raise ValueError("the weight's offsets must be laid out like its scales")
    if weight.packed.stride(1) != 1 or weight.scales.stride(1) != 1:
        raise ValueError("the rows of a packed weight must be contiguous")


def _splits(tiles: int, steps: int, programs: int) -> tuple[int, int]:
    """How many programs share a reduction of `steps`, and how many steps each takes; none of them has nothing to do."""
    wanted = min(max(programs // max(tiles, 1), 1), steps)
    each = triton.cdiv(steps, wanted)
    return triton.cdiv(steps, each), each


def _reduce(
    partial: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None, add: torch.Tensor | None
) -> torch.Tensor:
    splits, rows, n = partial.shape
    b, a = (out if t is None else t for t in (bias, add))
    options = launch.options("quantized_linear_reduce", launch.architecture(out.device), dtype=torch.float32, width=n)
    launch.run(
        quantized_linear_reduce_kernel, (rows, triton.cdiv(n, options["BLOCK"])),
        partial, b, a, out, rows, n, splits, b.stride(0), *a.stride(), *out.stride(),
        BIAS=bias is not None, ADD=add is not None, **options,
    )  # fmt: skip
    return out


def _check(weight: PackedWeight, k: int, x: torch.Tensor, out: torch.Tensor, expected: tuple[int, int]) -> None:
    if weight.shape[1] != k:
        raise ValueError(f"x has {k} columns, but the weight has {weight.shape[1]}")
    check_layout(weight)
    checks.shape("out", out, expected)
    checks.floating(x=x, out=out)
    checks.writable(out=out)


def _options(name: str, x: torch.Tensor, weight: PackedWeight) -> launch.Options:
    arch = launch.architecture(x.device)
    options = dict(launch.options(name, arch, dtype=x.dtype, rows=len(x)))
    group = weight.group
    if group < NARROWEST_GROUP or group % min(options["BLOCK_K"], group):
        raise ValueError(
            f"groups of {group} columns do not fit tiles of {options['BLOCK_K']}: they must be {NARROWEST_GROUP} or "
            "more, and a multiple of the tile"
        )
    options["BLOCK_K"] = min(options["BLOCK_K"], group)
    return options
