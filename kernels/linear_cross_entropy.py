# mypy: allow-untyped-defs
"""Cross entropy of h Wᵀ without the logits: loss, arg-max and dh in one walk over the vocabulary.

For a row h with target t, logits z_v = h · W_v (or cap·tanh(h · W_v / cap)), and the softmax q *over the other tokens*,

    M = max_{v≠t} z_v      s = Σ_{v≠t} exp(z_v − M)      q_v = exp(z_v − M)/s      gap = M + log s − z_t

    nll = log(1 + exp(gap))                    1 − p_t = σ(gap)
    dh  = w σ(gap) (Σ_{v≠t} q_v z′_v W_v − z′_t W_t)            z′ = 1, or 1 − (z/cap)² with a softcap

which is Σ_v w (p_v − [v = t]) z′_v W_v with the target taken out of the sum: p_t − 1 is never a difference of nearly
equal numbers, so a confident row keeps a dh (and a loss) of full relative precision, where softmax − one-hot rounds to
nothing. This is attention over the vocabulary with one query per row and keys = values = W, and like flash attention
(arXiv 2205.14135) it needs no second walk: M and s are kept online, and what has been summed is rescaled when M grows.
Two products per tile (z, and q W) instead of the three of a loss kernel and a gradient kernel (Cut Cross-Entropy, arXiv
2411.09009, whose idea it is not to store logits); the logits exist one tile at a time, in registers.

Σ q W of BLOCK_N rows does not fit in registers (64 × 1536 floats), so each program owns an fp32 buffer [BLOCK_N, d]
that it alone reads and writes, tile after tile. The vocabulary is split over programs; the merge kernel adds their
buffers in the order of the splits. No atomics, equal bits in every run. The price is 8 · d bytes of cache traffic per
row and tile of BLOCK_V tokens, hence the wide BLOCK_V of the launch table.

Skipped tiles. A tile's second product is left out where it cannot matter: for every row that counts, the mass of all
tiles skipped so far and of this one stays within u times the mass s seen so far, u the unit roundoff of h's type (2⁻⁹
bf16, 2⁻¹² fp16, 2⁻²⁵ fp32). M and s themselves always see every tile. s only grows, so that for every row

    ‖dh − dh without skipping‖ ≤ u · w (1 − p_t) · max_v ‖W_v‖

which is what rounding q to the working type costs anyway. The bound is relative to 1 − p_t: rows that the model has
nearly learnt are treated like others.
"""

import torch
import triton
import triton.language as tl

from . import checks, launch
from .packing import PackedWeight
from .quantized_linear import dequantized_tile, packed_constants

UNIT_ROUNDOFF = {torch.float32: 2.0**-25, torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9}
"""Share of a row's mass that skipped tiles may have; fp32's 2⁻²⁵ is half of what its own rounding costs."""

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tanh(x):
    small = x * (1.0 - x * x * (1.0 / 3.0 - x * x * (2.0 / 15.0)))
    return tl.where(tl.abs(x) < 0.06, small, 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x)))


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2E)


@triton.jit
def _wide(x):
    """x as a 64-bit integer, also where it is a constant."""
    return tl.full((), x, tl.int64)


@triton.jit
def _any(flags):
    return tl.max(flags.to(tl.int32), 0) > 0


@triton.jit
def _head_tile(
    w_ptr, packed, o_v, start, d, head_row, head_col, EVEN: tl.constexpr,
    FORM: tl.constexpr, ZERO: tl.constexpr, OFFSETS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Columns [start, start + BLOCK) of rows o_v of W, [ROWS, BLOCK], 0 or finite beyond column d.

    w_ptr and the pointers in `packed` stand at row 0 of o_v. FORM: 0 as stored, 1 int8, 2 int4 (packing.py). A tile of
    int4 lies in one half of the columns: the launcher sees to that.
    """
    o_c = tl.arange(0, BLOCK)
    if FORM == 0:
        # offsets inside a tile are 32 bits wide (the launcher checks), the tile's own start is 64 bits wide
        p_w = w_ptr + _wide(start) * head_col + (o_v[:, None] * head_row + o_c[None, :] * head_col)
        if EVEN:
            return tl.load(p_w)
        else:
            return tl.load(p_w, mask=(start + o_c < d)[None, :], other=0.0)
    else:
        scales_ptr, offsets_ptr, scales_row, columns, groups = packed
        is_high = (FORM == 2) & (start >= columns)
        at = tl.where(is_high, start - columns, start)
        b_q = tl.load(w_ptr + at + o_v[:, None] * head_row + o_c[None, :], mask=(at + o_c < columns)[None, :], other=0)
        if FORM == 2:
            b_q = tl.where(is_high, b_q >> 4, b_q & 15)
        return dequantized_tile(
            b_q, scales_ptr, offsets_ptr, o_v, o_v >= 0, start, groups, scales_row, ZERO, OFFSETS, GROUP, ROWS, BLOCK
        )


@triton.jit
def _logits(
    h_ptr, w_ptr, packed, o_n, o_v, d, softcap, h_row, h_col, head_row, head_col,
    SOFTCAP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    FORM: tl.constexpr, ZERO: tl.constexpr, OFFSETS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """z of one tile [BLOCK_N, BLOCK_V]; h_ptr and w_ptr point at its first rows, o_n and o_v count rows from there."""
    o_d = tl.arange(0, BLOCK_D)
    o_h = o_n[:, None] * h_row + o_d[None, :] * h_col
    b_z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, d, BLOCK_D):
        # [BLOCK_N, BLOCK_D], [BLOCK_V, BLOCK_D]
        b_h = tl.load(h_ptr + o_h) if EVEN else tl.load(h_ptr + o_h, mask=(start + o_d < d)[None, :], other=0.0)
        b_w = _head_tile(
            w_ptr, packed, o_v, start, d, head_row, head_col, EVEN, FORM, ZERO, OFFSETS, GROUP, BLOCK_V, BLOCK_D
        )
        b_z = tl.dot(b_h, tl.trans(b_w.to(b_h.dtype)), b_z, input_precision=PRECISION)
        h_ptr += BLOCK_D * _wide(h_col)
    if SOFTCAP:
        b_z = softcap * _tanh(b_z / softcap)
    return b_z


@triton.jit
def _add_product(
    sum_ptr, w_ptr, packed, b_q, b_scale, o_n, o_v, rows, filled, d, head_row, head_col,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
    FORM: tl.constexpr, ZERO: tl.constexpr, OFFSETS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """sum [BLOCK_N, d] ← scale · sum + q [BLOCK_N, BLOCK_V] W for `rows` rows; the first `filled` hold a sum."""
    o_e = tl.arange(0, BLOCK_E)
    o_sum = o_n[:, None] * d + o_e[None, :]
    m_filled, m_rows = (o_n < filled)[:, None], (o_n < rows)[:, None]
    for start in range(0, d, BLOCK_E):
        # [BLOCK_V, BLOCK_E], [BLOCK_N, BLOCK_E]
        b_w = _head_tile(
            w_ptr, packed, o_v, start, d, head_row, head_col, EVEN, FORM, ZERO, OFFSETS, GROUP, BLOCK_V, BLOCK_E
        )
        if EVEN:
            m_read, m_write = m_filled, m_rows
        else:
            m_e = (start + o_e < d)[None, :]
            m_read, m_write = m_filled & m_e, m_rows & m_e
        b_sum = tl.load(sum_ptr + o_sum, mask=m_read, other=0.0) * b_scale
        b_sum += tl.dot(b_q, b_w.to(b_q.dtype), input_precision=PRECISION)
        tl.store(sum_ptr + o_sum, b_sum, mask=m_write)
        sum_ptr += BLOCK_E


@triton.jit(do_not_specialize=["N", "tiles"])
def linear_cross_entropy_kernel(
    h_ptr, head_ptr, scales_ptr, offsets_ptr, target_ptr, weight_ptr,
    maximum_ptr, mass_ptr, target_logit_ptr, best_ptr, used_ptr, sum_ptr,
    N, V, d, tiles, softcap, budget,
    h_row, h_col, head_row, head_col, scales_row, columns, groups, target_step, weight_step,
    GRADIENT: tl.constexpr, SOFTCAP: tl.constexpr, SHIFT: tl.constexpr,
    FORM: tl.constexpr, ZERO: tl.constexpr, OFFSETS: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows against one split of the vocabulary (`tiles` tiles).

    Writes per row M, s (times 2^SHIFT), z_t (−inf where t is in another split) and the arg-max of the others; where
    GRADIENT, Σ exp(z − M) z′ W into sum[split], and the factor it still lacks (0: nothing was summed).
    """
    i_n, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = tl.minimum(N - i_n * BLOCK_N, BLOCK_N).to(tl.int32)
    # [BLOCK_N]: rows beyond the last are computed as copies of it and never stored
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < rows
    o_row = tl.minimum(o_n, rows - 1)
    at = i_n * BLOCK_N + o_row
    b_target = tl.load(target_ptr + at * target_step).to(tl.int32)
    b_counts = m_n & (b_target >= 0) & (tl.load(weight_ptr + at * weight_step) != 0.0)
    h_ptr += i_n * BLOCK_N * h_row
    # a multiple of d: the compiler sees that rows are aligned
    sum_ptr += (_wide(i_s) * N + i_n * BLOCK_N) * d
    b_m = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    b_zt = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    b_s = tl.zeros((BLOCK_N,), tl.float32)
    b_best = tl.zeros((BLOCK_N,), tl.int32)
    b_skipped = tl.zeros((BLOCK_N,), tl.float32)
    b_scale = tl.full((BLOCK_N,), 1.0, tl.float32)
    filled = tl.full((), 0, tl.int32)
    for first in range(i_s * tiles * BLOCK_V, min((i_s + 1) * tiles * BLOCK_V, V), BLOCK_V):
        # [BLOCK_V]
        o_v = first + tl.arange(0, BLOCK_V)
        o_tile = tl.minimum(o_v, V - 1) - first
        w_ptr = head_ptr + _wide(first) * head_row
        at_scale = _wide(first) * scales_row
        packed = (scales_ptr + at_scale, offsets_ptr + at_scale, scales_row, columns, groups)
        # [BLOCK_N, BLOCK_V]
        b_z = _logits(
            h_ptr, w_ptr, packed, o_row, o_tile, d, softcap, h_row, h_col, head_row, head_col,
            SOFTCAP, EVEN, PRECISION, FORM, ZERO, OFFSETS, GROUP, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        has_target = _any((b_target >= first) & (b_target < first + BLOCK_V))
        if has_target | (first + BLOCK_V > V):
            m_t = b_target[:, None] == o_v[None, :]
            b_zt = tl.maximum(b_zt, tl.max(tl.where(m_t, b_z, float("-inf")), 1))
            b_z = tl.where(m_t | (o_v >= V)[None, :], float("-inf"), b_z)
        b_high = tl.max(b_z, 1)
        if _any(b_high > b_m):
            o_high = tl.min(tl.where(b_z == b_high[:, None], o_v[None, :], V), 1)
            b_best = tl.where(b_high > b_m, o_high, b_best)
        b_new = tl.maximum(b_m, b_high)
        # where all is hidden so far, −inf − (−inf) would be NaN
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_shrink = _exp(b_m - b_base)
        b_q = tl.exp2((b_z - b_base[:, None]) * _LOG2E + SHIFT)
        b_mass = tl.sum(b_q, 1)
        b_s = b_s * b_shrink + b_mass
        b_m = b_new
        if GRADIENT:
            b_scale = b_scale * b_shrink
            b_skipped = b_skipped * b_shrink
            if _any(b_counts & (b_skipped + b_mass > budget * b_s)):
                if SOFTCAP:
                    b_ratio = b_z / softcap
                    b_q = tl.where(b_q > 0.0, b_q * (1.0 - b_ratio * b_ratio), 0.0)
                _add_product(
                    sum_ptr, w_ptr, packed, b_q.to(h_ptr.dtype.element_ty), b_scale[:, None], o_n, o_tile, rows,
                    filled, d, head_row, head_col, EVEN, PRECISION, FORM, ZERO, OFFSETS, GROUP, BLOCK_V, BLOCK_E,
                )  # fmt: skip
                b_scale = tl.full((BLOCK_N,), 1.0, tl.float32)
                filled = rows
                # the next tile's threads may hold other elements of the sum
                tl.debug_barrier()
            else:
                b_skipped += b_mass
    at += _wide(i_s) * N
    tl.store(maximum_ptr + at, b_m, mask=m_n)
    tl.store(mass_ptr + at, b_s, mask=m_n)
    tl.store(target_logit_ptr + at, b_zt, mask=m_n)
    tl.store(best_ptr + at, b_best, mask=m_n)
    if GRADIENT:
        # 0 where nothing was summed, else the factor that the last maximum still asks for
        tl.store(used_ptr + at, tl.where(filled > 0, b_scale, 0.0), mask=m_n)


@triton.jit(do_not_specialize=["N", "splits"])
def linear_cross_entropy_merge_kernel(
    maximum_ptr, mass_ptr, target_logit_ptr, best_ptr, used_ptr, sum_ptr,
    head_ptr, scales_ptr, offsets_ptr, target_ptr, weight_ptr, nll_ptr, predicted_ptr, dh_ptr,
    N, d, splits, softcap,
    head_row, head_col, scales_row, columns, groups, target_step, weight_step, dh_row, dh_col,
    GRADIENT: tl.constexpr, SOFTCAP: tl.constexpr, SHIFT: tl.constexpr,
    FORM: tl.constexpr, ZERO: tl.constexpr, OFFSETS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of the loss and arg-max, and where GRADIENT a block of dh: the splits merged in ascending order."""
    i_n, i_d = tl.program_id(0), tl.program_id(1)
    # [BLOCK_N]
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_target = tl.load(target_ptr + o_n * target_step, mask=m_n, other=-1)
    b_m = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    b_zt = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    b_best = tl.zeros((BLOCK_N,), tl.int32)
    for i_s in range(0, splits):
        at = i_s * _wide(N) + o_n
        b_high = tl.load(maximum_ptr + at, mask=m_n, other=0.0)
        b_best = tl.where(b_high > b_m, tl.load(best_ptr + at, mask=m_n, other=0), b_best)
        b_m = tl.maximum(b_m, b_high)
        b_zt = tl.maximum(b_zt, tl.load(target_logit_ptr + at, mask=m_n, other=0.0))
    b_base = tl.where(b_m == float("-inf"), 0.0, b_m)
    b_s = tl.zeros((BLOCK_N,), tl.float32)
    for i_s in range(0, splits):
        at = i_s * _wide(N) + o_n
        b_share = _exp(tl.load(maximum_ptr + at, mask=m_n, other=0.0) - b_base)
        b_s += tl.load(mass_ptr + at, mask=m_n, other=0.0) * b_share
    b_gap = b_base + (tl.log2(b_s) - SHIFT) / _LOG2E - b_zt
    if i_d == 0:
        b_small = _exp(-tl.abs(b_gap))
        b_one = 1.0 + b_small
        # log(1 + x) for small x: the rounding of 1 + x cancels in x/((1 + x) − 1)
        b_log = tl.where(b_one == 1.0, b_small, tl.log(b_one) * (b_small / tl.where(b_one == 1.0, 1.0, b_one - 1.0)))
        b_nll = tl.maximum(b_gap, 0.0) + b_log
        tl.store(nll_ptr + o_n, tl.where(b_target >= 0, b_nll, 0.0), mask=m_n)
        is_target = (b_target >= 0) & ((b_zt > b_m) | ((b_zt == b_m) & (b_target < b_best)))
        tl.store(predicted_ptr + o_n, tl.where(is_target, b_target.to(tl.int64), b_best.to(tl.int64)), mask=m_n)
    if GRADIENT:
        b_weight = tl.load(weight_ptr + o_n * weight_step, mask=m_n, other=0.0)
        b_factor = tl.where(b_target >= 0, b_weight, 0.0) * tl.sigmoid(b_gap)
        # [BLOCK_D], [BLOCK_N, BLOCK_D]
        o_d = i_d.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        m_dh = (m_n & (b_factor != 0.0))[:, None] & (o_d < d)[None, :]
        b_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for i_s in range(0, splits):
            at = i_s * _wide(N) + o_n
            b_used = tl.load(used_ptr + at, mask=m_n, other=0.0)
            b_share = b_used * _exp(tl.load(maximum_ptr + at, mask=m_n, other=0.0) - b_base)
            p_sum = sum_ptr + _wide(i_s) * N * d + (o_n * d)[:, None] + o_d[None, :]
            b_sum += tl.load(p_sum, mask=m_dh & (b_used > 0.0)[:, None], other=0.0) * b_share[:, None]
        b_slope = tl.full((BLOCK_N,), 1.0, tl.float32)
        if SOFTCAP:
            b_ratio = b_zt / softcap
            b_slope = 1.0 - b_ratio * b_ratio
        packed = (scales_ptr, offsets_ptr, scales_row, columns, groups)
        b_wt = _head_tile(
            head_ptr, packed, tl.maximum(b_target, 0), i_d * BLOCK_D, d, head_row, head_col, False,
            FORM, ZERO, OFFSETS, GROUP, BLOCK_N, BLOCK_D,
        ).to(dh_ptr.dtype.element_ty).to(tl.float32)  # fmt: skip
        b_mean = b_sum / tl.where(b_s > 0.0, b_s, 1.0)[:, None]
        b_dh = tl.where(m_dh, b_factor[:, None] * (b_mean - b_slope[:, None] * b_wt), 0.0)
        p_dh = dh_ptr + (o_n * dh_row)[:, None] + (o_d * dh_col)[None, :]
        tl.store(p_dh, b_dh, mask=m_n[:, None] & (o_d < d)[None, :])


def splits_of(rows: int, vocabulary: int, options: launch.Options) -> tuple[int, int]:
    """How the vocabulary is shared out: (splits, tiles per split). No split is empty."""
    tiles = triton.cdiv(vocabulary, options["BLOCK_V"])
    wanted = triton.cdiv(options["PROGRAMS"], max(triton.cdiv(rows, options["BLOCK_N"]), 1))
    per_split = triton.cdiv(tiles, min(max(wanted, 1), tiles))
    return triton.cdiv(tiles, per_split), per_split


def workspace_bytes(rows: int, d: int, vocabulary: int, options: launch.Options, gradient: bool) -> int:
    """Device memory that one call allocates besides its results."""
    splits, _ = splits_of(rows, vocabulary, options)
    return splits * rows * 4 * ((5 + d) if gradient else 4)


def linear_cross_entropy(
    h: torch.Tensor,
    head: torch.Tensor | PackedWeight,
    targets: torch.Tensor,
    weights: torch.Tensor,
    *,
    softcap: float | None = None,
    dh: torch.Tensor | None = None,
    skip: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and arg-max of softmax(h headᵀ) per row, and where wanted dh = weights · d nll/dh.

    h, dh [N, d] and head [V, d] float32, float16 or bfloat16, any strides (dh not expanded); targets [N] int64, −1 =
    ignored, otherwise below V (not checked on the device); weights [N] float32. skip=False sums every tile. A quantised
    head is dequantised tile by tile, to h's type.
    Returns nll [N] float32, unweighted, 0 where ignored, and predicted [N] int64, the lowest arg-max, of every row.
    dh is 0 where ignored or where the weight is 0; all targets ignored gives zeros.
    Raises ValueError where shapes or types do not fit.
    """
    rows, d = h.shape
    vocabulary = head.shape[0]
    if head.shape[1] != d:
        raise ValueError(f"head has shape {list(head.shape)}, but h has {d} columns")
    stored = head.packed if isinstance(head, PackedWeight) else head
    checks.shape("targets", targets, (rows,))
    checks.shape("weights", weights, (rows,))
    checks.floating(h=h) if isinstance(head, PackedWeight) else checks.floating(h=h, head=head)
    if dh is not None:
        checks.shape("dh", dh, (rows, d))
        checks.floating(dh=dh)
        checks.writable(dh=dh)
    arch = launch.architecture(h.device)
    options = _fitted(launch.options("linear_cross_entropy", arch, dtype=h.dtype, width=d), head)
    reach = max(options["BLOCK_V"] * stored.stride(0), options["BLOCK_N"] * h.stride(0))
    if reach + max(options["BLOCK_D"], options["BLOCK_E"]) * max(stored.stride(1), h.stride(1)) >= 2**31:
        raise ValueError("the strides of h or head are so large that offsets inside a tile need more than 32 bits")
    splits, tiles = splits_of(rows, vocabulary, options)
    statistics = torch.empty(4, splits, rows, dtype=torch.float32, device=h.device)
    maximum, mass, target_logit, used = statistics
    best = torch.empty(splits, rows, dtype=torch.int32, device=h.device)
    sums = torch.empty(splits if dh is not None else 0, rows, d, dtype=torch.float32, device=h.device)
    nll = torch.empty(rows, dtype=torch.float32, device=h.device)
    predicted = torch.empty(rows, dtype=torch.int64, device=h.device)
    shift = 15 if h.dtype == torch.float16 else 0  # q in fp16: small ones must not fall below its smallest number
    common = {"GRADIENT": dh is not None, "SOFTCAP": softcap is not None, "SHIFT": shift, **_form(head)}
    tensors, sizes = _head_arguments(head)
    blocks = {name: value for name, value in options.items() if name != "PROGRAMS"}
    budget = UNIT_ROUNDOFF[h.dtype] if skip else -1.0
    launch.run(
        linear_cross_entropy_kernel, (triton.cdiv(rows, options["BLOCK_N"]), splits),
        h, *tensors, targets, weights, maximum, mass, target_logit, best, used, sums,
        rows, vocabulary, d, tiles, softcap or 1.0, budget,
        *h.stride(), *sizes, *targets.stride(), *weights.stride(),
        EVEN=d % options["BLOCK_D"] == 0 and d % options["BLOCK_E"] == 0, PRECISION="ieee", **common, **blocks,
    )  # fmt: skip
    out = h if dh is None else dh
    merging = _fitted(launch.options("linear_cross_entropy_merge", arch, dtype=torch.float32, width=d), head)
    columns = triton.cdiv(d, merging["BLOCK_D"]) if dh is not None else 1
    launch.run(
        linear_cross_entropy_merge_kernel, (triton.cdiv(rows, merging["BLOCK_N"]), columns),
        maximum, mass, target_logit, best, used, sums, *tensors, targets, weights, nll, predicted, out,
        rows, d, splits, softcap or 1.0,
        *sizes, *targets.stride(), *weights.stride(), *out.stride(),
        **common, **merging,
    )  # fmt: skip
    return nll, predicted


def _form(head: torch.Tensor | PackedWeight) -> dict[str, object]:
    """The constants that say how the head is stored."""
    if not isinstance(head, PackedWeight):
        return {"FORM": 0, "ZERO": 0, "OFFSETS": False, "GROUP": 1}
    constants = packed_constants(head)
    return {"FORM": 2 if constants.pop("INT4") else 1, **constants}


def _head_arguments(head: torch.Tensor | PackedWeight) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    """Tensors (W, scales, offsets) and numbers (row and column strides, scales' row stride, columns, groups)."""
    if not isinstance(head, PackedWeight):
        return (head, head, head), (*head.stride(), 0, 0, 0)
    offsets = head.scales if head.offsets is None else head.offsets
    sizes = (*head.packed.stride(), head.scales.stride(0), head.packed.shape[1], head.scales.shape[1])
    return (head.packed, head.scales, offsets), sizes


def _fitted(options: launch.Options, head: torch.Tensor | PackedWeight) -> launch.Options:
    """Blocks of columns that lie in one half of an int4 row and hold whole groups or parts of one."""
    if not isinstance(head, PackedWeight):
        return options
    limit = 1 << 30 if head.kind == "int8" else head.packed.shape[1] & -head.packed.shape[1]
    return {name: min(size, limit) if name in ("BLOCK_D", "BLOCK_E") else size for name, size in options.items()}
