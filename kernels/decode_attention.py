# mypy: allow-untyped-defs
"""Attention of one new token per sequence: against a prefix that all of them share, and against its own keys.

    s_j = σ q·k_j (soft-capped as in tree_attention)      o = Σ_j exp(s_j − lse) v_j over prefix and own keys together

q is [B, H, D]; the prefix's K and V are [S, G, D], the sequences' own [B, C, G, D], of which the first own_lengths[b]
count. With a sliding window, first_seen[b] is the first key that the query still sees: keys are counted through the
prefix and on through the sequence's own.

A new token meets every key once, so that the time is that of reading K and V, and the prefix is the longest part:

    prefix    rows are (sequence, head of the group) pairs, BLOCK_Q of them to a program: the prefix is read once for
              that many, and its products have the shape of a matrix core instead of one row.
    own       one sequence and one group to a program. Both kinds of program are one launch.
    merge     both are split over the keys, so that a few sequences still fill the device; every split leaves (m, l, o),
              o not yet divided by l, and a row's parts p are put together (FlashAttention-2, arXiv 2307.08691, 3.1):
              M = max_p m_p,   o = Σ_p exp2(m_p − M) o_p / Σ_p exp2(m_p − M) l_p.
              A part without a visible key has l = 0 and m = −∞ and stores no o; a row without any gives 0.

The number of splits follows from the capacities S, B and C, not from own_lengths. Nothing is read back, and with a
workspace nothing is allocated. So a step can be captured in a CUDA graph. The order of every sum is fixed.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .tree_attention import bf16_in_bits, block_width, check_heads, load_tile, online_softmax


@triton.jit
def _store_part(
    b_o, b_m, b_l, part_o, part_m, part_l, i_part, o_r, m_r, num_rows, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One part's rows; i_part counts (part, group). Rows that saw nothing store only l and m."""
    o_d = tl.arange(0, BLOCK_D)
    o_at = i_part * num_rows + o_r
    tl.store(part_m + o_at, b_m, mask=m_r)
    tl.store(part_l + o_at, b_l, mask=m_r)
    m_o = (m_r & (b_l > 0.0))[:, None] & (o_d < D)[None, :]
    tl.store(part_o + o_at[:, None] * D + o_d[None, :], b_o, mask=m_o)


@triton.jit
def _prefix_part(
    pid, q, k, v, first_seen, part_o, part_m, part_l,
    stride_qb, stride_qh, stride_qd, stride_ks, stride_kg, stride_kd, stride_vs, stride_vg, stride_vd,
    num_sequences, num_keys, splits, keys_per_split, scale, softcap,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BF16_IN_BITS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q rows of one group against one split of the prefix. pid counts (row block, split, group)."""
    i_r, i_p, i_g = pid // (splits * GROUPS), pid // GROUPS % splits, (pid % GROUPS).to(tl.int64)
    num_rows = num_sequences * GROUP
    o_d, o_j = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    # [BLOCK_Q]
    o_r = i_r * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_r = o_r < num_rows
    o_b, o_h = (o_r // GROUP).to(tl.int64), i_g * GROUP + o_r % GROUP
    # [BLOCK_Q, BLOCK_D]
    b_q = load_tile(q, o_b * stride_qb + o_h * stride_qh, o_d, 1, stride_qd, m_r, D, BLOCK_D, True)
    b_o = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    b_m = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([BLOCK_Q], dtype=tl.float32)

    start = i_p * keys_per_split
    end = tl.minimum(start + keys_per_split, num_keys)
    whole_end = start + (end - start) // BLOCK_K * BLOCK_K
    k += i_g * stride_kg
    v += i_g * stride_vg
    b_first = o_r
    if first_seen is not None:
        b_first = tl.load(first_seen + o_b, mask=m_r, other=num_keys).to(tl.int32)
        start = tl.maximum(start, tl.min(b_first, 0) // BLOCK_K * BLOCK_K)
        whole_end = start
    for i_s in range(start, whole_end, BLOCK_K):
        p_s = tl.cast(i_s, tl.int64)
        # [BLOCK_K, BLOCK_D]
        b_k = load_tile(k + p_s * stride_ks, o_j, o_d, stride_ks, stride_kd, o_j >= 0, D, BLOCK_D, False)
        b_v = load_tile(v + p_s * stride_vs, o_j, o_d, stride_vs, stride_vd, o_j >= 0, D, BLOCK_D, False)
        b_o, b_m, b_l = online_softmax(b_q, b_k, b_v, b_o, b_m, b_l, True, scale, softcap, BF16_IN_BITS, False)
    for i_s in range(whole_end, end, BLOCK_K):
        p_s = tl.cast(i_s, tl.int64)
        m_k = i_s + o_j < end
        b_k = load_tile(k + p_s * stride_ks, o_j, o_d, stride_ks, stride_kd, m_k, D, BLOCK_D, True)
        b_v = load_tile(v + p_s * stride_vs, o_j, o_d, stride_vs, stride_vd, m_k, D, BLOCK_D, True)
        m_seen = m_k[None, :]
        if first_seen is not None:
            m_seen = m_seen & (i_s + o_j[None, :] >= b_first[:, None])
        b_o, b_m, b_l = online_softmax(b_q, b_k, b_v, b_o, b_m, b_l, m_seen, scale, softcap, BF16_IN_BITS, True)
    _store_part(b_o, b_m, b_l, part_o, part_m, part_l, i_p * GROUPS + i_g, o_r, m_r, num_rows, D, BLOCK_D)


@triton.jit
def _own_part(
    pid, q, k, v, own_lengths, first_seen, part_o, part_m, part_l,
    stride_qb, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kg, stride_kd, stride_vb, stride_vs, stride_vg, stride_vd,
    num_sequences, prefix_keys, splits, keys_per_split, first_part, scale, softcap,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BF16_IN_BITS: tl.constexpr,
):  # fmt: skip
    """One program: one sequence's rows of one group against one split of its own keys. pid counts (B, split, group)."""
    i_b, i_p, i_g = pid // (splits * GROUPS), pid // GROUPS % splits, (pid % GROUPS).to(tl.int64)
    length = tl.load(own_lengths + i_b).to(tl.int32)
    o_d, o_j = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    # [BLOCK_H]
    o_h = tl.arange(0, BLOCK_H)
    m_h = o_h < GROUP
    p_b = i_b.to(tl.int64)
    # [BLOCK_H, BLOCK_D]
    p_q = q + p_b * stride_qb + i_g * GROUP * stride_qh
    b_q = load_tile(p_q, o_h, o_d, stride_qh, stride_qd, m_h, D, BLOCK_D, True)
    b_o = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    b_m = tl.full([BLOCK_H], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([BLOCK_H], dtype=tl.float32)

    start = i_p * keys_per_split
    end = tl.minimum(start + keys_per_split, length)
    first = 0
    if first_seen is not None:
        first = tl.maximum(tl.load(first_seen + i_b).to(tl.int32) - prefix_keys, 0)
        start = tl.maximum(start, first // BLOCK_K * BLOCK_K)
    k += p_b * stride_kb + i_g * stride_kg
    v += p_b * stride_vb + i_g * stride_vg
    for i_s in range(start, end, BLOCK_K):
        p_s = tl.cast(i_s, tl.int64)
        m_k = (i_s + o_j < end) & (i_s + o_j >= first)
        # [BLOCK_K, BLOCK_D]
        b_k = load_tile(k + p_s * stride_ks, o_j, o_d, stride_ks, stride_kd, m_k, D, BLOCK_D, True)
        b_v = load_tile(v + p_s * stride_vs, o_j, o_d, stride_vs, stride_vd, m_k, D, BLOCK_D, True)
        b_o, b_m, b_l = online_softmax(b_q, b_k, b_v, b_o, b_m, b_l, m_k[None, :], scale, softcap, BF16_IN_BITS, True)
    i_part = (first_part + i_p) * GROUPS + i_g
    num_rows = num_sequences * GROUP
    _store_part(b_o, b_m, b_l, part_o, part_m, part_l, i_part, i_b * GROUP + o_h, m_h, num_rows, D, BLOCK_D)


@triton.jit(do_not_specialize=[
    "prefix_programs", "num_sequences", "prefix_keys", "prefix_splits", "prefix_split_keys", "own_splits",
    "own_split_keys",
])  # fmt: skip
def decode_parts_kernel(
    q, prefix_k, prefix_v, own_k, own_v, own_lengths, first_seen, part_o, part_m, part_l,
    stride_qb, stride_qh, stride_qd, stride_ks, stride_kg, stride_kd, stride_vs, stride_vg, stride_vd,
    stride_kb, stride_kc, stride_kh, stride_ke, stride_vb, stride_vc, stride_vh, stride_ve,
    prefix_programs, num_sequences, prefix_keys, prefix_splits, prefix_split_keys, own_splits, own_split_keys,
    scale, softcap,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    BF16_IN_BITS: tl.constexpr,
):  # fmt: skip
    """Grid (prefix_programs + B · own_splits · G): the longer programs, those of the prefix, come first.

    Strides of the own keys and values: b sequence, c position, h group, e element.
    """
    pid = tl.program_id(0)
    if pid < prefix_programs:
        _prefix_part(
            pid, q, prefix_k, prefix_v, first_seen, part_o, part_m, part_l,
            stride_qb, stride_qh, stride_qd, stride_ks, stride_kg, stride_kd, stride_vs, stride_vg, stride_vd,
            num_sequences, prefix_keys, prefix_splits, prefix_split_keys, scale, softcap,
            GROUPS, GROUP, D, BLOCK_Q, BLOCK_K, BLOCK_D, BF16_IN_BITS,
        )  # fmt: skip
    else:
        _own_part(
            pid - prefix_programs, q, own_k, own_v, own_lengths, first_seen, part_o, part_m, part_l,
            stride_qb, stride_qh, stride_qd,
            stride_kb, stride_kc, stride_kh, stride_ke, stride_vb, stride_vc, stride_vh, stride_ve,
            num_sequences, prefix_keys, own_splits, own_split_keys, prefix_splits, scale, softcap,
            GROUPS, GROUP, D, BLOCK_H, BLOCK_K, BLOCK_D, BF16_IN_BITS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_sequences", "num_parts"])
def decode_merge_kernel(
    part_o, part_m, part_l, out, stride_ob, stride_oh, stride_od,
    num_sequences, num_parts,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (B · H / G, G). One program: the parts of one row, BLOCK_P at a time."""
    i_r, i_g = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_rows = num_sequences * GROUP
    o_d, o_p = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_P)
    b_o = tl.zeros([BLOCK_D], dtype=tl.float32)
    highest, total = float("-inf"), 0.0
    for i_p in range(0, num_parts, BLOCK_P):
        # [BLOCK_P]
        m_p = i_p + o_p < num_parts
        o_at = ((i_p + o_p) * GROUPS + i_g) * num_rows + i_r
        b_m = tl.load(part_m + o_at, mask=m_p, other=float("-inf"))
        b_l = tl.load(part_l + o_at, mask=m_p, other=0.0)
        new = tl.maximum(highest, tl.max(b_m, 0))
        pivot = tl.where(new == float("-inf"), 0.0, new)
        decay = tl.exp2(highest - pivot)
        b_w = tl.exp2(b_m - pivot)
        # [BLOCK_P, BLOCK_D]; what a part without a visible key left behind is not read
        m_o = (m_p & (b_l > 0.0))[:, None] & (o_d < D)[None, :]
        b_part = tl.load(part_o + o_at[:, None] * D + o_d[None, :], mask=m_o, other=0.0)
        b_o = b_o * decay + tl.sum(b_part * b_w[:, None], 0)
        total = total * decay + tl.sum(b_l * b_w, 0)
        highest = new
    b_o = b_o * (1.0 / tl.where(total == 0.0, 1.0, total))
    p_out = out + (i_r // GROUP).to(tl.int64) * stride_ob + (i_g * GROUP + i_r % GROUP) * stride_oh
    tl.store(p_out + o_d * stride_od, b_o.to(out.dtype.element_ty), mask=o_d < D)


def _splits(keys: int, programs: int, wanted: int, block_k: int) -> tuple[int, int]:
    """(number of splits, keys of each): about `wanted` programs in all, where one split would be `programs` of them."""
    blocks = triton.cdiv(keys, block_k)
    per_split = triton.cdiv(blocks, min(max(wanted // programs, 1), blocks)) if blocks else 1
    return triton.cdiv(blocks, per_split), per_split * block_k


def _plan(q: Tensor, groups: int, prefix: int, own: int, options: Mapping[str, int]) -> tuple[int, int, int, int]:
    """(splits of the prefix, keys of each, splits of the own keys, keys of each), from the capacities alone."""
    row_blocks = triton.cdiv(q.shape[0] * (q.shape[1] // groups), options["BLOCK_Q"])
    wanted, block_k = options["PROGRAMS"], options["BLOCK_K"]
    return *_splits(prefix, row_blocks * groups, wanted, block_k), *_splits(own, q.shape[0] * groups, wanted, block_k)


def _options(q: Tensor, options: Mapping[str, int] | None) -> Mapping[str, int]:
    if options is not None:
        return options
    return launch.options("decode_attention", launch.architecture(q.device), dtype=q.dtype, head_dim=q.shape[2])


def workspace_size(q: Tensor, prefix_k: Tensor, own_k: Tensor, options: Mapping[str, int] | None = None) -> int:
    """fp32 elements that `decode_attention` needs for its parts: (splits of prefix and own keys) · B · H · (D + 2)."""
    prefix_splits, _, own_splits, _ = _plan(q, prefix_k.shape[1], len(prefix_k), own_k.shape[1], _options(q, options))
    return (prefix_splits + own_splits) * q.shape[0] * q.shape[1] * (q.shape[2] + 2)


def decode_attention(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    own_lengths: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    first_seen: Tensor | None = None,
    out: Tensor,
    workspace: Tensor | None = None,
    options: Mapping[str, int] | None = None,
) -> None:
    """Writes out [B, H, D] (the type of q).

    q: [B, H, D]; prefix_k, prefix_v: [S, G, D], S ≥ 0; own_k, own_v: [B, C, G, D], C ≥ 0; any strides. own_lengths: [B]
    int32 or int64 on the device, each in [0, C]; keys beyond it are never read. first_seen: [B] of such a type, where a
    sliding window hides the keys before it; each at least 0. workspace: fp32, contiguous, at least `workspace_size`
    elements; allocated when not given. scale > 0.
    Raises ValueError for shapes or types that do not fit together.
    """
    group = check_heads(q, prefix_k, prefix_v)
    (batch, heads, dim), (prefix, groups, _), capacity = q.shape, prefix_k.shape, own_k.shape[1]
    if own_k.shape != (batch, capacity, groups, dim) or own_v.shape != own_k.shape:
        raise ValueError(f"own_k is {list(own_k.shape)} and own_v {list(own_v.shape)}; q is {list(q.shape)}")
    if own_k.dtype != q.dtype or own_v.dtype != q.dtype:
        raise ValueError(f"q and the own keys have different types: {q.dtype}, {own_k.dtype}, {own_v.dtype}")
    if own_lengths.shape != (batch,) or own_lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"own_lengths is {own_lengths.dtype} {list(own_lengths.shape)}; expected int32 or int64 [{batch}]"
        )
    if first_seen is not None and (first_seen.shape != (batch,) or first_seen.dtype not in (torch.int32, torch.int64)):
        raise ValueError(
            f"first_seen is {first_seen.dtype} {list(first_seen.shape)}; expected int32 or int64 [{batch}]"
        )
    if out.shape != q.shape or scale <= 0:
        raise ValueError(f"out is {list(out.shape)}, q {list(q.shape)}, scale {scale}")
    if batch == 0:
        return
    options = _options(q, options)
    needed = workspace_size(q, prefix_k, own_k, options)
    if workspace is None:
        workspace = torch.empty(needed, dtype=torch.float32, device=q.device)
    elif workspace.dtype != torch.float32 or not workspace.is_contiguous() or workspace.numel() < needed:
        raise ValueError(f"the workspace is {workspace.dtype} {list(workspace.shape)}; expected {needed} float32")
    prefix_splits, prefix_keys, own_splits, own_keys = _plan(q, groups, prefix, capacity, options)
    parts = prefix_splits + own_splits
    stats, lengths = parts * batch * heads, own_lengths.contiguous()
    first_seen = first_seen.contiguous() if first_seen is not None else None
    flat = workspace.view(-1)
    where = (flat[2 * stats : needed], flat[:stats], flat[stats : 2 * stats])
    constants = {"GROUPS": groups, "GROUP": group, "D": dim, "BLOCK_D": block_width(dim)}
    usual = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    prefix_programs = triton.cdiv(batch * group, options["BLOCK_Q"]) * prefix_splits * groups
    if parts:
        launch.run(
            decode_parts_kernel, (prefix_programs + batch * own_splits * groups,),
            q, prefix_k, prefix_v, own_k, own_v, lengths, first_seen, *where,
            *q.stride(), *prefix_k.stride(), *prefix_v.stride(), *own_k.stride(), *own_v.stride(),
            prefix_programs, batch, prefix, prefix_splits, prefix_keys, own_splits, own_keys,
            scale, softcap,
            BLOCK_Q=options["BLOCK_Q"], BLOCK_H=block_width(group), BLOCK_K=options["BLOCK_K"],
            BF16_IN_BITS=bf16_in_bits(q), **constants, **usual,
        )  # fmt: skip
    launch.run(
        decode_merge_kernel, (batch * group, groups),
        *where, out, *out.stride(), batch, parts, BLOCK_P=16, num_warps=1, **constants,
    )  # fmt: skip
