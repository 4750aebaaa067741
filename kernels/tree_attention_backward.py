# mypy: allow-untyped-defs
"""Attention over a token tree, backward: dQ by blocks of queries, dK and dV by blocks of keys.

With the forward's definitions (tree_attention), do the gradient of o, σ the scale and c the softcap:

    P_ij = exp(s_ij − lse_i)            D_i = Σ_d do_id o_id            dP_ij = do_i·v_j
    dS_ij = P_ij (dP_ij − D_i)          times 1 − (s_ij / c)² with a softcap
    dq_i = σ Σ_j dS_ij k_j              dk_j = σ Σ_i dS_ij q_i          dv_j = Σ_i P_ij do_i

(FlashAttention-2, arXiv 2307.08691, algorithm 2; the sums over i are over the query heads of the group as well). P is
rebuilt from lse, the logarithm over *all* keys of the row, so that a launch may have any part of the keys and any part
of the queries, and parts add up. A row that saw no key has lse = −∞; its P is 0.

Kernels.
    rows      D_i, and lse in base 2 with +∞ in place of −∞ (exp2(s − ∞) = 0), both [G, Nq · group]: rows of a group lie
              side by side, as the other kernels read them.
    dq        one block of rows against its list of key blocks, as in the forward.
    dkv       one block of the tree's own keys against one piece of the rows that see it (tree_schedule: QueryPieces).
              A block whose rows are one piece is written at once; a prefix block, which every branch sees, has many
              pieces, and each leaves fp32 partial sums in a slot of its own.
    reduce    adds the slots of a block in the order of their rows.
No sum is atomic and every order is fixed by the mask and the launch parameters, so two runs give equal bits.

P and dS are rounded to the input's type before the products they enter, sums are fp32. The prefix's keys are frozen: dk
and dv are for the tree's own keys. For the gradient of fewer queries or keys, give q, do, o, lse or k, v and the mask
of those (prefix = 0): the first layer needs them only where a prompt row is shown.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .tree_attention import (
    LOG2E,
    bf16_in_bits,
    block_width,
    check_heads,
    check_schedule,
    count_extras,
    load_tile,
    narrowed,
    soft_capped,
    visible,
)
from .tree_schedule import ROWS_ALIGNED, QueryPieces, TreeSchedule

Options = Mapping[str, int]


@triton.jit(do_not_specialize=["num_queries", "row_pitch"])
def tree_attention_rows_kernel(
    do, o, lse, row_delta, row_lse,
    stride_dt, stride_dh, stride_dd, stride_ot, stride_oh, stride_od, stride_lt, stride_lh,
    num_queries, row_pitch,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ROWS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, G): D_i, and lse in base 2 or +∞; 0 and +∞ from the last row to the end of the pitch."""
    i_r, i_g = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_rows = num_queries * GROUP
    o_d = tl.arange(0, BLOCK_D)
    # [BLOCK_R]
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < num_rows
    o_t, o_h = (o_r // GROUP).to(tl.int64), i_g * GROUP + o_r % GROUP
    # [BLOCK_R, BLOCK_D]
    b_do = load_tile(do, o_t * stride_dt + o_h * stride_dh, o_d, 1, stride_dd, m_r, D, BLOCK_D, True)
    b_o = load_tile(o, o_t * stride_ot + o_h * stride_oh, o_d, 1, stride_od, m_r, D, BLOCK_D, True)
    b_lse = tl.load(lse + o_t * stride_lt + o_h * stride_lh, mask=m_r, other=float("-inf"))
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    pitch = row_pitch * ROWS_ALIGNED
    tl.store(row_delta + i_g * pitch + o_r, b_delta, mask=o_r < pitch)
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)
    tl.store(row_lse + i_g * pitch + o_r, b_lse, mask=o_r < pitch)


@triton.jit
def _weights(b_s, b_lse, m_seen, scale, softcap, MASKED: tl.constexpr):
    """(P, s) from products q·k; b_lse: [rows of b_s or columns], in base 2, broadcast by the caller."""
    if softcap is not None:
        b_s = soft_capped(b_s * scale, softcap)
        b_p = tl.exp2(b_s * LOG2E - b_lse)
    else:
        b_p = tl.exp2(b_s * (scale * LOG2E) - b_lse)
    if MASKED:
        b_p = tl.where(m_seen, b_p, 0.0)
    return b_p, b_s


@triton.jit
def _dq_step(
    b_dq, b_q, b_do, b_lse, b_delta, b_index, b_position, i_s,
    k, v, key_begin, key_length, key_position,
    stride_ks, stride_kd, stride_vs, stride_vd,
    num_keys, window, scale, softcap,
    D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    BF16_IN_BITS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys, from key i_s on, added to dq (without the factor σ)."""
    o_d = tl.arange(0, BLOCK_D)
    # [BLOCK_K]; keys after the last are invisible, and any row will do for them
    o_j = tl.arange(0, BLOCK_K)
    o_s = tl.minimum(o_j, num_keys - 1 - i_s) if MASKED else o_j
    p_s = i_s.to(tl.int64)
    # [BLOCK_K, BLOCK_D]
    b_k = load_tile(k + p_s * stride_ks, o_s, o_d, stride_ks, stride_kd, True, D, BLOCK_D, False)
    b_v = load_tile(v + p_s * stride_vs, o_s, o_d, stride_vs, stride_vd, True, D, BLOCK_D, False)
    # [BLOCK_Q, BLOCK_K]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    m_seen = True
    if MASKED:
        b_begin = tl.load(key_begin + i_s + o_j)
        b_length = tl.load(key_length + i_s + o_j)
        b_key_position = tl.load(key_position + i_s + o_j) if key_position is not None else b_begin
        m_seen = visible(
            b_index[:, None], b_position[:, None], b_begin[None, :], b_length[None, :], b_key_position[None, :],
            window, key_position is not None,
        )  # fmt: skip
    b_p, b_s = _weights(b_s, b_lse[:, None], m_seen, scale, softcap, MASKED)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
    b_ds = b_p * (b_dp - b_delta[:, None])
    if softcap is not None:
        b_ds = b_ds * (1.0 - (b_s / softcap) * (b_s / softcap))
    # [BLOCK_Q, BLOCK_D]
    return tl.dot(narrowed(b_ds, b_k.dtype, BF16_IN_BITS), b_k, b_dq, input_precision="ieee")


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_key_blocks", "row_pitch", "window"])
def tree_attention_dq_kernel(
    do, q, k, v, row_delta, row_lse, dq,
    key_begin, key_length, key_position, query_index, query_position,
    block_order, block_counts,
    stride_dt, stride_dh, stride_dd, stride_qt, stride_qh, stride_qd,
    stride_ks, stride_kg, stride_kd, stride_vs, stride_vg, stride_vd, stride_gt, stride_gh, stride_gd,
    num_queries, num_keys, num_key_blocks, row_pitch, window, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    BF16_IN_BITS: tl.constexpr, ROWS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, G). One program: dq of BLOCK_Q rows of one group. g in stride_g*: the gradient dq."""
    num_rows = num_queries * GROUP
    i_b = tl.cdiv(num_rows, BLOCK_Q) - 1 - tl.program_id(0)
    i_g = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    # [BLOCK_Q]
    o_r = i_b * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_r = o_r < num_rows
    o_t, o_h = (o_r // GROUP).to(tl.int64), i_g * GROUP + o_r % GROUP
    b_index = tl.load(query_index + o_t, mask=m_r, other=-1)
    b_position = tl.load(query_position + o_t, mask=m_r, other=0) if query_position is not None else b_index
    b_delta = tl.load(row_delta + i_g * row_pitch * ROWS_ALIGNED + o_r, mask=m_r, other=0.0)
    b_lse = tl.load(row_lse + i_g * row_pitch * ROWS_ALIGNED + o_r, mask=m_r, other=float("inf"))
    # [BLOCK_Q, BLOCK_D]
    b_q = load_tile(q, o_t * stride_qt + o_h * stride_qh, o_d, 1, stride_qd, m_r, D, BLOCK_D, True)
    b_do = load_tile(do, o_t * stride_dt + o_h * stride_dh, o_d, 1, stride_dd, m_r, D, BLOCK_D, True)
    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)

    k += i_g * stride_kg
    v += i_g * stride_vg
    p_order = block_order + i_b.to(tl.int64) * num_key_blocks
    n_whole = tl.load(block_counts + 2 * i_b)
    n_partial = tl.load(block_counts + 2 * i_b + 1)
    for i in range(0, n_whole):
        b_dq = _dq_step(
            b_dq, b_q, b_do, b_lse, b_delta, b_index, b_position, tl.load(p_order + i) * BLOCK_K,
            k, v, key_begin, key_length, key_position, stride_ks, stride_kd, stride_vs, stride_vd,
            num_keys, window, scale, softcap, D, BLOCK_K, BLOCK_D, BF16_IN_BITS, False,
        )  # fmt: skip
    for i in range(n_whole, n_whole + n_partial):
        b_dq = _dq_step(
            b_dq, b_q, b_do, b_lse, b_delta, b_index, b_position, tl.load(p_order + i) * BLOCK_K,
            k, v, key_begin, key_length, key_position, stride_ks, stride_kd, stride_vs, stride_vd,
            num_keys, window, scale, softcap, D, BLOCK_K, BLOCK_D, BF16_IN_BITS, True,
        )  # fmt: skip
    p_dq = dq + (o_t * stride_gt + o_h * stride_gh)[:, None] + o_d[None, :] * stride_gd
    tl.store(p_dq, (b_dq * scale).to(dq.dtype.element_ty), mask=m_r[:, None] & (o_d < D)[None, :])


@triton.jit
def _from_first_query(o_r, i_r, GROUP: tl.constexpr):
    """(query, head) of the rows, queries counted from that of row i_r: 32 bits suffice for offsets from there."""
    o_r -= i_r // GROUP * GROUP
    return o_r // GROUP, o_r % GROUP


@triton.jit
def _dkv_step(
    b_dk, b_dv, b_k, b_v, b_begin, b_length, b_key_position, i_r,
    do, q, row_delta, row_lse, row_index, row_position,
    stride_dt, stride_dh, stride_dd, stride_qt, stride_qh, stride_qd,
    num_rows, window, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
    BF16_IN_BITS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of rows, from row i_r on, added to dk (without the factor σ) and dv; all but b_* are of one group."""
    o_d = tl.arange(0, BLOCK_D)
    # [BLOCK_Q]; rows after the last have lse = +∞, and any query will do for them
    o_r = i_r + tl.arange(0, BLOCK_Q)
    o_t, o_h = _from_first_query(tl.minimum(o_r, num_rows - 1) if MASKED else o_r, i_r, GROUP)
    p_t = tl.cast(i_r // GROUP, tl.int64)
    # [BLOCK_Q, BLOCK_D]
    b_q = load_tile(q + p_t * stride_qt, o_t * stride_qt + o_h * stride_qh, o_d, 1, stride_qd, True, D, BLOCK_D, False)
    b_do = load_tile(
        do + p_t * stride_dt, o_t * stride_dt + o_h * stride_dh, o_d, 1, stride_dd, True, D, BLOCK_D, False
    )
    b_lse = tl.load(row_lse + o_r)
    b_delta = tl.load(row_delta + o_r)
    m_seen = True
    if MASKED:
        b_index = tl.load(row_index + o_r)
        b_position = tl.load(row_position + o_r) if row_position is not None else b_index
        m_seen = visible(
            b_index[None, :], b_position[None, :], b_begin[:, None], b_length[:, None], b_key_position[:, None],
            window, row_position is not None,
        )  # fmt: skip
    # [BLOCK_K, BLOCK_Q]: everything is transposed, so that P and dS enter their products as they are
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
    b_p, b_s = _weights(b_s, b_lse[None, :], m_seen, scale, softcap, MASKED)
    # [BLOCK_K, BLOCK_D]
    b_dv = tl.dot(narrowed(b_p, b_do.dtype, BF16_IN_BITS), b_do, b_dv, input_precision="ieee")
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
    b_ds = b_p * (b_dp - b_delta[None, :])
    if softcap is not None:
        b_ds = b_ds * (1.0 - (b_s / softcap) * (b_s / softcap))
    b_dk = tl.dot(narrowed(b_ds, b_q.dtype, BF16_IN_BITS), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit
def _in_window(i_r, b_key_position, row_position, window, BLOCK_Q: tl.constexpr):
    """Whether some row of the block can have some key of the block inside its window."""
    b_position = tl.load(row_position + i_r + tl.arange(0, BLOCK_Q))
    return tl.min(b_position, 0) - tl.max(b_key_position, 0) < window


@triton.jit
def _store_partial(b_dk, b_dv, partial, slot, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """A piece's sums, whole tiles: dk, then dv."""
    o_tile = tl.arange(0, BLOCK_K)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    p_slot = partial + slot * 2 * (BLOCK_K * BLOCK_D)
    tl.store(p_slot + o_tile, b_dk)
    tl.store(p_slot + BLOCK_K * BLOCK_D + o_tile, b_dv)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "row_pitch", "window"])
def tree_attention_dkv_kernel(
    do, q, k, v, row_delta, row_lse, dk, dv, partial,
    key_begin, key_length, key_position, row_index, row_position, pieces,
    stride_dt, stride_dh, stride_dd, stride_qt, stride_qh, stride_qd,
    stride_ks, stride_kg, stride_kd, stride_vs, stride_vg, stride_vd,
    stride_gs, stride_gg, stride_gd, stride_hs, stride_hg, stride_hd,
    num_queries, num_keys, row_pitch, window, scale, softcap,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    BF16_IN_BITS: tl.constexpr, ROWS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """Grid (pieces, G). One program: one block of keys against one piece of the rows that see it.

    k, v, key_begin, key_length, key_position start at the tree's own keys, of which there are num_keys. g and h in the
    strides: the gradients dk and dv.
    """
    p_piece = pieces + tl.program_id(0) * 6
    i_g = tl.program_id(1).to(tl.int64)
    i_b = tl.load(p_piece)
    if i_b < 0:
        return
    row = tl.multiple_of(tl.load(p_piece + 1), ROWS_ALIGNED)
    whole = tl.multiple_of(tl.load(p_piece + 3), ROWS_ALIGNED)
    whole_end = tl.multiple_of(tl.load(p_piece + 4), ROWS_ALIGNED)
    row_end, slot = tl.load(p_piece + 2), tl.load(p_piece + 5)

    o_d = tl.arange(0, BLOCK_D)
    # [BLOCK_K]
    o_j = i_b * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_j < num_keys
    b_begin = tl.load(key_begin + o_j, mask=m_k, other=0)
    b_length = tl.load(key_length + o_j, mask=m_k, other=0)
    b_key_position = tl.load(key_position + o_j, mask=m_k, other=0) if key_position is not None else b_begin
    # [BLOCK_K, BLOCK_D]
    o_s = o_j.to(tl.int64)
    b_k = load_tile(k + i_g * stride_kg, o_s, o_d, stride_ks, stride_kd, m_k, D, BLOCK_D, True)
    b_v = load_tile(v + i_g * stride_vg, o_s, o_d, stride_vs, stride_vd, m_k, D, BLOCK_D, True)
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)

    num_rows = num_queries * GROUP
    q += i_g * GROUP * stride_qh
    do += i_g * GROUP * stride_dh
    row_delta += i_g * row_pitch * ROWS_ALIGNED
    row_lse += i_g * row_pitch * ROWS_ALIGNED
    for i_r in range(whole, whole_end, BLOCK_Q):
        b_dk, b_dv = _dkv_step(
            b_dk, b_dv, b_k, b_v, b_begin, b_length, b_key_position, i_r,
            do, q, row_delta, row_lse, row_index, row_position,
            stride_dt, stride_dh, stride_dd, stride_qt, stride_qh, stride_qd,
            num_rows, window, scale, softcap, GROUP, D, BLOCK_Q, BLOCK_D, BF16_IN_BITS, False,
        )  # fmt: skip
    # The rows before and after those that see the whole block.
    n_before = (whole - row) // BLOCK_Q
    for i in range(0, n_before + tl.cdiv(row_end - whole_end, BLOCK_Q)):
        i_r = tl.where(i < n_before, row + i * BLOCK_Q, whole_end + (i - n_before) * BLOCK_Q)
        i_r = tl.multiple_of(i_r, ROWS_ALIGNED)
        inside = True
        if row_position is not None:
            inside = _in_window(i_r, b_key_position, row_position, window, BLOCK_Q)
        if inside:
            b_dk, b_dv = _dkv_step(
                b_dk, b_dv, b_k, b_v, b_begin, b_length, b_key_position, i_r,
                do, q, row_delta, row_lse, row_index, row_position,
                stride_dt, stride_dh, stride_dd, stride_qt, stride_qh, stride_qd,
                num_rows, window, scale, softcap, GROUP, D, BLOCK_Q, BLOCK_D, BF16_IN_BITS, True,
            )  # fmt: skip

    if slot < 0:
        m_kd = m_k[:, None] & (o_d < D)[None, :]
        p_dk = dk + i_g * stride_gg + o_s[:, None] * stride_gs + o_d[None, :] * stride_gd
        p_dv = dv + i_g * stride_hg + o_s[:, None] * stride_hs + o_d[None, :] * stride_hd
        tl.store(p_dk, (b_dk * scale).to(dk.dtype.element_ty), mask=m_kd)
        tl.store(p_dv, b_dv.to(dv.dtype.element_ty), mask=m_kd)
    else:
        _store_partial(b_dk, b_dv, partial, slot.to(tl.int64) * GROUPS + i_g, BLOCK_K, BLOCK_D)


@triton.jit(do_not_specialize=["num_keys"])
def tree_attention_reduce_kernel(
    partial, dk, dv, blocks,
    stride_gs, stride_gg, stride_gd, stride_hs, stride_hg, stride_hd,
    num_keys, scale,
    GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid (key blocks, elements of a tile / BLOCK_E, G): the slots of one block added in their order."""
    i_b, i_e, i_g = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, n_slots = tl.load(blocks + 2 * i_b).to(tl.int64), tl.load(blocks + 2 * i_b + 1)
    if n_slots == 0:
        return
    TILE: tl.constexpr = BLOCK_K * BLOCK_D
    STEP: tl.constexpr = GROUPS * 2 * TILE
    # [BLOCK_E]
    o_e = i_e * BLOCK_E + tl.arange(0, BLOCK_E)
    b_dk = tl.zeros([BLOCK_E], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_E], dtype=tl.float32)
    # [BLOCK_S]
    o_s = tl.arange(0, BLOCK_S)
    for i in range(0, n_slots, BLOCK_S):
        # [BLOCK_S, BLOCK_E]
        m_s = (i + o_s < n_slots)[:, None] & (o_e < TILE)[None, :]
        p_slot = partial + ((first + i + o_s) * STEP + i_g * 2 * TILE)[:, None] + o_e[None, :]
        b_dk += tl.sum(tl.load(p_slot, mask=m_s, other=0.0), 0)
        b_dv += tl.sum(tl.load(p_slot + TILE, mask=m_s, other=0.0), 0)
    o_j, o_d = (i_b * BLOCK_K + o_e // BLOCK_D).to(tl.int64), o_e % BLOCK_D
    m_e = (o_e < TILE) & (o_j < num_keys) & (o_d < D)
    p_dk = dk + i_g * stride_gg + o_j * stride_gs + o_d * stride_gd
    p_dv = dv + i_g * stride_hg + o_j * stride_hs + o_d * stride_hd
    tl.store(p_dk, (b_dk * scale).to(dk.dtype.element_ty), mask=m_e)
    tl.store(p_dv, b_dv.to(dv.dtype.element_ty), mask=m_e)


def row_pitch(queries: int, group: int, block_q: int) -> int:
    """Rows from one group to the next in the row arrays, in units of ROWS_ALIGNED: room for a block past the end."""
    return triton.cdiv(queries * group + block_q, ROWS_ALIGNED)


def workspace_size(schedule: TreeSchedule, heads: int, groups: int, dim: int, dkv: Options | None) -> int:
    """fp32 elements that `tree_attention_backward` needs: D and lse of each row, and the slots of partial sums.

    dkv: launch parameters of the dK, dV kernel; None where dk and dv are not wanted. At most
    2 (Nq H + G · (BLOCK_Q + 4)) + 4 · max(PROGRAMS, G) · BLOCK_K · (head dimension, padded).
    """
    group, block_q = heads // groups, dkv["BLOCK_Q"] if dkv is not None else 0
    rows = 2 * groups * row_pitch(len(schedule.query_index), group, block_q) * ROWS_ALIGNED
    if dkv is None:
        return rows
    pieces = _pieces(schedule, group, groups, dkv)
    return rows + 2 * pieces.slots * groups * dkv["BLOCK_K"] * block_width(dim)


def plan(
    schedule: TreeSchedule,
    heads: int,
    groups: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    dq: bool,
    dkv: bool,
) -> None:
    """Make the schedule's lists for launches on `device` with `heads` query heads over `groups` key/value heads."""
    if not len(schedule.query_index):
        return
    arch, extras = launch.architecture(device), count_extras(schedule, None)
    of_dq, of_dkv = (
        launch.options(f"tree_attention_backward_{name}", arch, dtype=dtype, head_dim=dim, extras=extras)
        for name in ("dq", "dkv")
    )
    if dq:
        schedule.key_lists(heads // groups, of_dq["BLOCK_Q"], of_dq["BLOCK_K"])
    if dkv:
        _pieces(schedule, heads // groups, groups, of_dkv)


def _pieces(schedule: TreeSchedule, group: int, groups: int, dkv: Options) -> QueryPieces:
    return schedule.query_pieces(group, dkv["BLOCK_Q"], dkv["BLOCK_K"], max(dkv["PROGRAMS"] // groups, 1))


def tree_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    schedule: TreeSchedule,
    *,
    scale: float,
    softcap: float | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    workspace: Tensor | None = None,
    options: Mapping[str, Options] | None = None,
) -> None:
    """Writes dq [Nq, H, D], and dk and dv [S − prefix, G, D]; what is None is not computed (dk and dv go together).

    do, q, o: [Nq, H, D]; k, v: [S, G, D]; lse: [Nq, H] float32 of the forward, all with any strides (do may be
    expanded). schedule: the forward's mask. workspace: fp32, contiguous, at least `workspace_size` elements; allocated
    when not given. options: launch parameters by name ("tree_attention_backward_dq", "..._dkv") instead of the table's.
    Raises ValueError for shapes or types that do not fit together.
    """
    group = check_heads(q, k, v)
    (queries, heads, dim), (keys, groups, _) = q.shape, k.shape
    tree_keys = (keys - schedule.prefix, groups, dim)
    for name, x, shape in (("do", do, q.shape), ("o", o, q.shape), ("lse", lse, q.shape[:2]), ("dq", dq, q.shape),
                           ("dk", dk, tree_keys), ("dv", dv, tree_keys)):  # fmt: skip
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} is {list(x.shape)}; expected {list(shape)}")
    if do.dtype != q.dtype or lse.dtype != torch.float32:
        raise ValueError(f"do is {do.dtype} and lse {lse.dtype}; expected {q.dtype} and torch.float32")
    if (dk is None) != (dv is None):
        raise ValueError("dk and dv are computed together: give both or neither")
    check_schedule(schedule, queries, keys)
    if dk is not None and dv is not None and queries == 0:
        dk.zero_()
        dv.zero_()
    if queries == 0 or (dq is None and dk is None):
        return
    options = {} if options is None else options
    arch, extras = launch.architecture(q.device), count_extras(schedule, softcap)

    def of(name: str) -> Options:
        if name in options:
            return options[name]
        return launch.options(name, arch, dtype=q.dtype, head_dim=dim, extras=extras)

    of_dkv = of("tree_attention_backward_dkv") if dk is not None else None
    needed = workspace_size(schedule, heads, groups, dim, of_dkv)
    if workspace is None:
        workspace = torch.empty(needed, dtype=torch.float32, device=q.device)
    elif workspace.dtype != torch.float32 or not workspace.is_contiguous() or workspace.numel() < needed:
        raise ValueError(f"the workspace is {workspace.dtype} {list(workspace.shape)}; expected {needed} float32")
    pitch = row_pitch(queries, group, of_dkv["BLOCK_Q"] if of_dkv is not None else 0)
    rows = pitch * ROWS_ALIGNED * groups
    row_delta, row_lse, partial = workspace.view(-1)[:needed].split((rows, rows, needed - 2 * rows))

    width, rows_per_program = block_width(dim), 32
    launch.run(
        tree_attention_rows_kernel, (triton.cdiv(pitch * ROWS_ALIGNED, rows_per_program), groups),
        do, o, lse, row_delta, row_lse, *do.stride(), *o.stride(), *lse.stride(), queries, pitch,
        GROUP=group, D=dim, BLOCK_R=rows_per_program, BLOCK_D=width, ROWS_ALIGNED=ROWS_ALIGNED,
    )  # fmt: skip
    inputs = (do, q, k, v, row_delta, row_lse)
    strides = (*do.stride(), *q.stride(), *k.stride(), *v.stride())
    common = (pitch, schedule.window, scale, softcap)
    constants = {
        "GROUP": group, "D": dim, "BLOCK_D": width, "BF16_IN_BITS": bf16_in_bits(q),
        "ROWS_ALIGNED": ROWS_ALIGNED,
    }  # fmt: skip
    if dq is not None:
        _launch_dq(inputs, strides, dq, schedule, common, {**constants, **of("tree_attention_backward_dq")})
    if dk is not None and dv is not None and of_dkv is not None and tree_keys[0]:
        _launch_dkv(inputs, strides, dk, dv, partial, schedule, common, {**constants, **of_dkv})


def _launch_dq(
    inputs: tuple[Tensor, ...],
    strides: tuple[int, ...],
    dq: Tensor,
    schedule: TreeSchedule,
    common: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:
    queries, (keys, groups, _) = len(dq), inputs[2].shape
    lists = schedule.key_lists(constants["GROUP"], constants["BLOCK_Q"], constants["BLOCK_K"])
    launch.run(
        tree_attention_dq_kernel, (lists.order.shape[0], groups),
        *inputs, dq, lists.begin, lists.length, lists.position, schedule.query_index, schedule.query_position,
        lists.order, lists.counts, *strides, *dq.stride(), queries, keys, lists.order.shape[1], *common, **constants,
    )  # fmt: skip


def _launch_dkv(
    inputs: tuple[Tensor, ...],
    strides: tuple[int, ...],
    dk: Tensor,
    dv: Tensor,
    partial: Tensor,
    schedule: TreeSchedule,
    common: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:
    do, q, k, v, row_delta, row_lse = inputs
    queries, (tree_keys, groups, dim), prefix = len(q), dk.shape, schedule.prefix
    block_k, pieces = constants["BLOCK_K"], _pieces(schedule, constants["GROUP"], groups, constants)
    del constants["PROGRAMS"]
    key_position = schedule.key_position[prefix:] if schedule.key_position is not None else None
    launch.run(
        tree_attention_dkv_kernel, (len(pieces.pieces), groups),
        do, q, k[prefix:], v[prefix:], row_delta, row_lse, dk, dv, partial,
        schedule.key_begin[prefix:], schedule.key_length[prefix:], key_position, pieces.row_index, pieces.row_position,
        pieces.pieces, *strides, *dk.stride(), *dv.stride(), queries, tree_keys, *common, GROUPS=groups, **constants,
    )  # fmt: skip
    width, elements = constants["BLOCK_D"], 256
    launch.run(
        tree_attention_reduce_kernel, (len(pieces.blocks), triton.cdiv(block_k * width, elements), groups),
        partial, dk, dv, pieces.blocks, *dk.stride(), *dv.stride(), tree_keys, common[2],
        GROUPS=groups, D=dim, BLOCK_K=block_k, BLOCK_D=width, BLOCK_E=elements, BLOCK_S=8, num_warps=1,
    )  # fmt: skip
