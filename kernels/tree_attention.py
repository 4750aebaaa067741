# mypy: allow-untyped-defs
"""Attention over a token tree, forward.

Query i (tree index) sees key j where key_begin[j] ≤ i < key_end[j] and, with a sliding window w, where
position_i − position_j < w. With scale σ and the optional softcap c,

    s_ij = σ q_i·k_j          or  c tanh(σ q_i·k_j / c)
    lse_i = log Σ_j exp s_ij        (sum over the visible keys; −∞ where there is none)
    o_i = Σ_j exp(s_ij − lse_i) v_j                             (0 where there is none)

computed block of keys by block of keys with the online softmax (Milakov and Gimelshein, arXiv 1805.02867, algorithm 3;
FlashAttention-2, arXiv 2307.08691, algorithm 1). m and l are the running maximum and sum, in base 2 since exp2 is the
hardware's own exponential; m′, l′, o′ their values after a block, P its weights:

    m′ = max(m, max_j s_ij log₂e)   P = exp2(s log₂e − m′)   α = exp2(m − m′)
    l′ = α l + Σ_j P_ij             o′ = α o + P V            finally  o / l  and  lse = ln 2 · (m + log₂ l)

A row that has seen no key yet has m = −∞; the pivot is then 0 instead of m, so that nothing computes (−∞) − (−∞).

Products are of the input's type with fp32 sums; P is rounded to the input's type before P V, as transformers does.
GQA: the query heads of one group are rows of one block (see tree_schedule), so H query heads read K and V G times.
Which blocks of keys are visited, and which of them need a mask, comes from tree_schedule; a block that no query of the
program sees is never touched. Head dimensions between powers of two are padded with masked columns: of the models
this is for, all have 64 or 128, and splitting 80 into 64 + 16 would double the code for the others.
"""

import math
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .tree_schedule import TreeSchedule

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def soft_capped(b_s, cap):
    """cap · tanh(b_s / cap), through exp2 of a number that is never positive, so that nothing overflows."""
    b_t = tl.exp2(tl.abs(b_s) * (-2.0 * LOG2E / cap))
    b_t = cap * (1.0 - b_t) / (1.0 + b_t)
    return tl.where(b_s < 0, -b_t, b_t)


@triton.jit
def load_tile(p, o_row, o_d, stride_row, stride_d, m_row, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """[rows, BLOCK_D] from p + o_row · stride_row + o_d · stride_d; masked only where something can be outside."""
    p_tile = p + o_row[:, None] * stride_row + o_d[None, :] * stride_d
    if MASKED and BLOCK_D != D:
        b_tile = tl.load(p_tile, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
    elif MASKED:
        b_tile = tl.load(p_tile, mask=m_row[:, None], other=0.0)
    elif BLOCK_D != D:
        b_tile = tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)
    else:
        b_tile = tl.load(p_tile)
    return b_tile


@triton.jit
def visible(b_index, b_position, b_begin, b_length, b_key_position, window, WINDOW: tl.constexpr):
    """Which queries see which keys. begin ≤ index < begin + length is one comparison of numbers without a sign."""
    m_seen = (b_index - b_begin).to(tl.uint32, bitcast=True) < b_length.to(tl.uint32, bitcast=True)
    if WINDOW:
        m_seen = m_seen & (b_position - b_key_position < window)
    return m_seen


@triton.jit
def narrowed(b_x, DTYPE: tl.constexpr, BF16_IN_BITS: tl.constexpr):
    """b_x in the type of the product it enters.

    gfx942 has no instruction for fp32 → bf16, and rounding to even with its NaN test takes five per element, more than
    all else in the loop. BF16_IN_BITS: round to nearest, ties away from zero (one addition; the shift is part of the
    packing). The largest error is the same.
    """
    if BF16_IN_BITS:
        b_bits = (b_x.to(tl.uint32, bitcast=True) + 0x8000) >> 16
        b_y = b_bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        b_y = b_x.to(DTYPE)
    return b_y


@triton.jit
def online_softmax(
    b_q, b_k, b_v, b_o, b_m, b_l, m_seen, scale, softcap,
    BF16_IN_BITS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(o, m, l) after one more block of keys: the equations of the module's docstring."""
    # [rows, keys]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if softcap is not None:
        b_s = soft_capped(b_s * scale, softcap)
        to_base_2 = LOG2E
    else:
        to_base_2 = scale * LOG2E
    if MASKED:
        b_s = tl.where(m_seen, b_s, float("-inf"))
    # [rows]
    b_new = tl.maximum(b_m, tl.max(b_s, 1) * to_base_2)
    b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new) if MASKED else b_new
    b_decay = tl.exp2(b_m - b_pivot)
    # [rows, keys]
    b_p = tl.exp2(b_s * to_base_2 - b_pivot[:, None])
    b_l = b_l * b_decay + tl.sum(b_p, 1)
    # [rows, BLOCK_D]
    b_p = narrowed(b_p, b_v.dtype, BF16_IN_BITS)
    b_o = tl.dot(b_p, b_v, b_o * b_decay[:, None], input_precision="ieee")
    return b_o, b_new, b_l


@triton.jit
def _forward_step(
    b_q, b_o, b_m, b_l, b_index, b_position, i_s,
    k, v, key_begin, key_length, key_position,
    stride_ks, stride_kd, stride_vs, stride_vd,
    num_keys, window, scale, softcap,
    D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    BF16_IN_BITS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys, from key i_s on, added to (o, m, l)."""
    o_d = tl.arange(0, BLOCK_D)
    # [BLOCK_K]; keys after the last are invisible, and any row will do for them
    o_j = tl.arange(0, BLOCK_K)
    o_s = tl.minimum(o_j, num_keys - 1 - i_s) if MASKED else o_j
    p_s = i_s.to(tl.int64)
    # [BLOCK_K, BLOCK_D]
    b_k = load_tile(k + p_s * stride_ks, o_s, o_d, stride_ks, stride_kd, True, D, BLOCK_D, False)
    b_v = load_tile(v + p_s * stride_vs, o_s, o_d, stride_vs, stride_vd, True, D, BLOCK_D, False)
    m_seen = True
    if MASKED:
        b_begin = tl.load(key_begin + i_s + o_j)
        b_length = tl.load(key_length + i_s + o_j)
        b_key_position = tl.load(key_position + i_s + o_j) if key_position is not None else b_begin
        m_seen = visible(
            b_index[:, None], b_position[:, None], b_begin[None, :], b_length[None, :], b_key_position[None, :],
            window, key_position is not None,
        )  # fmt: skip
    return online_softmax(b_q, b_k, b_v, b_o, b_m, b_l, m_seen, scale, softcap, BF16_IN_BITS, MASKED)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_key_blocks", "window"])
def tree_attention_forward_kernel(
    q, k, v, o, lse,
    key_begin, key_length, key_position, query_index, query_position,
    block_order, block_counts,
    stride_qt, stride_qh, stride_qd, stride_ks, stride_kg, stride_kd, stride_vs, stride_vg, stride_vd,
    stride_ot, stride_oh, stride_od, stride_lt, stride_lh,
    num_queries, num_keys, num_key_blocks, window, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    BF16_IN_BITS: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, G). One program: BLOCK_Q rows of one group against every block of keys they see."""
    # The last blocks of a sequence see the most keys: start them first.
    i_b = tl.cdiv(num_queries * GROUP, BLOCK_Q) - 1 - tl.program_id(0)
    i_g = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    # [BLOCK_Q]
    o_r = i_b * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_r = o_r < num_queries * GROUP
    o_t, o_h = (o_r // GROUP).to(tl.int64), o_r % GROUP
    b_index = tl.load(query_index + o_t, mask=m_r, other=-1)
    b_position = tl.load(query_position + o_t, mask=m_r, other=0) if query_position is not None else b_index
    # [BLOCK_Q, BLOCK_D]
    q += i_g * GROUP * stride_qh
    b_q = load_tile(q, o_t * stride_qt + o_h * stride_qh, o_d, 1, stride_qd, m_r, D, BLOCK_D, True)

    b_o = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    b_m = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([BLOCK_Q], dtype=tl.float32)

    k += i_g * stride_kg
    v += i_g * stride_vg
    p_order = block_order + i_b.to(tl.int64) * num_key_blocks
    n_whole = tl.load(block_counts + 2 * i_b)
    n_partial = tl.load(block_counts + 2 * i_b + 1)
    for i in range(0, n_whole):
        b_o, b_m, b_l = _forward_step(
            b_q, b_o, b_m, b_l, b_index, b_position, tl.load(p_order + i) * BLOCK_K,
            k, v, key_begin, key_length, key_position, stride_ks, stride_kd, stride_vs, stride_vd,
            num_keys, window, scale, softcap, D, BLOCK_K, BLOCK_D, BF16_IN_BITS, False,
        )  # fmt: skip
    for i in range(n_whole, n_whole + n_partial):
        b_o, b_m, b_l = _forward_step(
            b_q, b_o, b_m, b_l, b_index, b_position, tl.load(p_order + i) * BLOCK_K,
            k, v, key_begin, key_length, key_position, stride_ks, stride_kd, stride_vs, stride_vd,
            num_keys, window, scale, softcap, D, BLOCK_K, BLOCK_D, BF16_IN_BITS, True,
        )  # fmt: skip

    # l is 0 in a row that has seen no key, and then m is −∞.
    b_l = tl.where(b_l == 0.0, 1.0, b_l)
    b_o = b_o * (1.0 / b_l)[:, None]
    b_lse = (b_m + tl.log2(b_l)) * LN2
    m_o = m_r[:, None] & (o_d < D)[None, :]
    p_o = o + (o_t * stride_ot + (i_g * GROUP + o_h) * stride_oh)[:, None] + o_d[None, :] * stride_od
    tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_o)
    tl.store(lse + o_t * stride_lt + (i_g * GROUP + o_h) * stride_lh, b_lse, mask=m_r)


def block_width(head_dim: int) -> int:
    """Columns of a tile: the next power of two, and no fewer than a matrix core takes."""
    return max(launch.power_of_two(head_dim), 16)


def bf16_in_bits(q: Tensor) -> bool:
    """Whether `narrowed` rounds to bf16 itself: where the hardware does not (CDNA 2 and 3)."""
    return q.dtype == torch.bfloat16 and launch.architecture(q.device).startswith(("gfx90", "gfx94"))


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> int:
    """The size of a query group. Raises ValueError where q [.., H, D] and k, v [.., G, D] do not fit together."""
    (_, heads, dim), (_, groups, key_dim) = q.shape, k.shape
    if k.shape != v.shape or dim != key_dim or heads % groups:
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit together")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v have different types: {q.dtype}, {k.dtype}, {v.dtype}")
    if dim > 256:
        raise ValueError(f"head dimension {dim} is larger than 256")
    return heads // groups


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    schedule: TreeSchedule,
    *,
    scale: float,
    softcap: float | None = None,
    out: Tensor,
    lse: Tensor,
    options: Mapping[str, int] | None = None,
) -> None:
    """Writes out [Nq, H, D] (the type of q) and lse [Nq, H] (float32, natural logarithm).

    q: [Nq, H, D]; k, v: [S, G, D], H a multiple of G; fp32, fp16 or bf16; any strides (views into a fused QKV buffer,
    expanded, transposed). schedule: the mask, with its query_index [Nq] and key_begin, key_end [S]. scale > 0.
    options: launch parameters instead of the table's.
    Allocates nothing but the schedule's lists, on their first use.
    Raises ValueError for shapes or types that do not fit together.
    """
    group = check_heads(q, k, v)
    (queries, heads, dim), (keys, groups, _) = q.shape, k.shape
    if out.shape != q.shape or lse.shape != (queries, heads) or lse.dtype != torch.float32:
        raise ValueError(f"out {list(out.shape)} or lse {list(lse.shape)} {lse.dtype} does not fit q {list(q.shape)}")
    check_schedule(schedule, queries, keys)
    if scale <= 0:
        raise ValueError(f"scale is {scale}; expected a positive number")
    if queries == 0:
        return
    if options is None:
        arch = launch.architecture(q.device)
        extras = count_extras(schedule, softcap)
        options = launch.options("tree_attention_forward", arch, dtype=q.dtype, head_dim=dim, extras=extras)
    lists = schedule.key_lists(group, options["BLOCK_Q"], options["BLOCK_K"])
    launch.run(
        tree_attention_forward_kernel, (lists.order.shape[0], groups),
        q, k, v, out, lse,
        lists.begin, lists.length, lists.position, schedule.query_index, schedule.query_position,
        lists.order, lists.counts,
        *q.stride(), *k.stride(), *v.stride(), *out.stride(), *lse.stride(),
        queries, keys, lists.order.shape[1], schedule.window, scale, softcap,
        GROUP=group, D=dim, BLOCK_D=block_width(dim), BF16_IN_BITS=bf16_in_bits(q),
        **options,
    )  # fmt: skip


def plan(schedule: TreeSchedule, group: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Make the schedule's lists for launches on `device` with query groups of `group` heads of size `dim`."""
    if len(schedule.query_index):
        options = launch.options(
            "tree_attention_forward", launch.architecture(device), dtype=dtype, head_dim=dim,
            extras=count_extras(schedule, None),
        )  # fmt: skip
        schedule.key_lists(group, options["BLOCK_Q"], options["BLOCK_K"])


def count_extras(schedule: TreeSchedule, softcap: float | None) -> int:
    """How many of window and softcap there are. Each needs registers, so the launch table looks at their number."""
    return (schedule.window is not None) + (softcap is not None)


def check_schedule(schedule: TreeSchedule, queries: int, keys: int) -> None:
    """Raises ValueError where the mask is for another number of queries or keys."""
    of_mask = len(schedule.query_index), len(schedule.key_begin)
    if of_mask != (queries, keys):
        raise ValueError(f"the mask is for {of_mask[0]} queries and {of_mask[1]} keys, not for {queries} and {keys}")
