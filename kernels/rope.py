# mypy: allow-untyped-defs
"""Rotary position embedding on the fused QKV buffer, in place, with Qwen3's per-head norm fused; and its transpose.

For each token t and each query or key head x [D] with halves x₁, x₂ (Su et al., arXiv 2104.09864, in the half-split
form of transformers):

    y₁ = x₁ cos_t − x₂ sin_t          y₂ = x₂ cos_t + x₁ sin_t

and backward the rotation by −θ. With qk-norm, x is first normed over its D elements, x ← round(x̂) ⊙ w with
x̂ = x·rsqrt(mean(x²) + ε), rounded where transformers' Qwen3RMSNorm rounds (not at all where w is float32, as in
Gemma 3); backward, after the inverse rotation,

    dx = r (w ⊙ dy − x̂ · mean(x̂ ⊙ w ⊙ dy)),          r, x̂ from the projections before the norm.

The rotation itself is fp32 with one rounding at the end. cos and sin come per token, so any position ids will do; the
value heads are not touched. A program has one token and BLOCK_H of its heads, few warps wide, so that a thread has
several heads of the same columns and loads their cos and sin once: with a head per thread, those loads were two thirds
of all. With a KV cache, the same launch stores the rotated key heads and the value heads there.
"""

import torch
import triton
import triton.language as tl

from . import checks, launch


@triton.jit
def rope_kernel(
    x_ptr, raw_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, keys_ptr, values_ptr, slots_ptr, eps,
    x_row, x_col, raw_row, raw_col, cos_row, cos_col, sin_row, sin_col, q_norm_col, k_norm_col,
    keys_row, keys_head, keys_col, values_row, values_head, values_col,
    H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr, WIDE: tl.constexpr, BACKWARD: tl.constexpr, STORE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rotates (forward) or rotates back (BACKWARD) BLOCK_H heads of a token; NORM: with the per-head norm.
    WIDE: x̂ is not rounded before the product with a norm's weight.

    STORE: the programs have the value heads as well, and store keys and values in row slots[t] of the KV cache.
    """
    HEADS: tl.constexpr = H + 2 * G if STORE else H + G
    n_blocks: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    pid = tl.program_id(0)
    i_t = (pid // n_blocks).to(tl.int64)
    # [BLOCK_H]
    o_h = (pid % n_blocks).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    # [BLOCK_D]
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    m_d = o_d < HALF
    b_cos = tl.load(cos_ptr + i_t * cos_row + o_d * cos_col, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_sin = tl.load(sin_ptr + i_t * sin_row + o_d * sin_col, mask=m_d, other=0.0).to(tl.float32)[None, :]
    # [BLOCK_H, BLOCK_D]
    m_x = (o_h < HEADS)[:, None] & m_d[None, :]
    p_1 = x_ptr + i_t * x_row + (o_h * (2 * HALF) * x_col)[:, None] + (o_d * x_col)[None, :]
    p_2 = p_1 + HALF * x_col
    b_1 = tl.load(p_1, mask=m_x, other=0.0).to(tl.float32)
    b_2 = tl.load(p_2, mask=m_x, other=0.0).to(tl.float32)
    b_v1, b_v2 = b_1, b_2
    if NORM:
        is_q = (o_h < H)[:, None]
        b_w1 = _norm_weight(q_norm_ptr, k_norm_ptr, q_norm_col, k_norm_col, o_d, m_d, is_q)
        b_w2 = _norm_weight(q_norm_ptr, k_norm_ptr, q_norm_col, k_norm_col, HALF + o_d, m_d, is_q)
    if BACKWARD:
        b_y1, b_y2 = b_1 * b_cos + b_2 * b_sin, b_2 * b_cos - b_1 * b_sin
        if NORM:
            p_r = raw_ptr + i_t * raw_row + (o_h * (2 * HALF) * raw_col)[:, None] + (o_d * raw_col)[None, :]
            b_x1 = tl.load(p_r, mask=m_x, other=0.0).to(tl.float32)
            b_x2 = tl.load(p_r + HALF * raw_col, mask=m_x, other=0.0).to(tl.float32)
            # [BLOCK_H, 1]
            r = _inverse_rms(b_x1, b_x2, HALF, eps)
            b_y1, b_y2 = b_y1 * b_w1, b_y2 * b_w2
            mean = (tl.sum(b_x1 * b_y1 + b_x2 * b_y2, 1) / (2 * HALF))[:, None] * r
            b_y1, b_y2 = r * (b_y1 - b_x1 * r * mean), r * (b_y2 - b_x2 * r * mean)
    else:
        if NORM:
            dtype: tl.constexpr = x_ptr.dtype.element_ty
            r = _inverse_rms(b_1, b_2, HALF, eps)
            hat: tl.constexpr = tl.float32 if WIDE else dtype
            b_1 = ((b_1 * r).to(hat).to(tl.float32) * b_w1).to(dtype).to(tl.float32)
            b_2 = ((b_2 * r).to(hat).to(tl.float32) * b_w2).to(dtype).to(tl.float32)
        b_y1, b_y2 = b_1 * b_cos - b_2 * b_sin, b_2 * b_cos + b_1 * b_sin
    if STORE:
        i_s = tl.load(slots_ptr + i_t).to(tl.int64)
        m_k = ((o_h >= H) & (o_h < H + G))[:, None] & m_d[None, :]
        p_k = keys_ptr + i_s * keys_row + ((o_h - H) * keys_head)[:, None] + (o_d * keys_col)[None, :]
        tl.store(p_k, b_y1, mask=m_k)
        tl.store(p_k + HALF * keys_col, b_y2, mask=m_k)
        m_v = ((o_h >= H + G) & (o_h < H + 2 * G))[:, None] & m_d[None, :]
        p_v = values_ptr + i_s * values_row + ((o_h - H - G) * values_head)[:, None] + (o_d * values_col)[None, :]
        tl.store(p_v, b_v1, mask=m_v)
        tl.store(p_v + HALF * values_col, b_v2, mask=m_v)
    m_x = m_x & (o_h < H + G)[:, None]
    tl.store(p_1, b_y1, mask=m_x)
    tl.store(p_2, b_y2, mask=m_x)


@triton.jit
def _inverse_rms(b_1, b_2, HALF: tl.constexpr, eps):
    return tl.rsqrt(tl.sum(b_1 * b_1 + b_2 * b_2, 1) / (2 * HALF) + eps)[:, None]


@triton.jit
def _norm_weight(q_norm_ptr, k_norm_ptr, q_norm_col, k_norm_col, o_d, m_d, is_q):
    b_q = tl.load(q_norm_ptr + o_d * q_norm_col, mask=m_d, other=0.0).to(tl.float32)
    b_k = tl.load(k_norm_ptr + o_d * k_norm_col, mask=m_d, other=0.0).to(tl.float32)
    return tl.where(is_q, b_q[None, :], b_k[None, :])


Cache = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Keys and values [N, G, D] of a KV cache, and the row [T] of each token."""


def rope(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: tuple[int, int, int],
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    cache: Cache | None = None,
) -> torch.Tensor:
    """Rotate the q and k heads of qkv [T, (H+2G)·D] in place; per-head RMS norm first where its weights are given.

    cos, sin [T, D/2]; heads = (H, G, D), D even, H or G may be 0; q_norm and k_norm [D], both or neither.
    cache: (keys [N, G, D], values [N, G, D], slots [T] int32 or int64, all different and below N): the rotated keys
    and the values of token t are also written to row slots[t] of keys and values, which have qkv's type.
    Raises ValueError where shapes or types do not fit, or qkv is expanded.
    """
    return _launch("rope", qkv, None, cos, sin, heads, q_norm, k_norm, eps, cache)


def rope_backward(
    dqkv: torch.Tensor,
    qkv_raw: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: tuple[int, int, int],
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """The transpose of `rope`, in place on the gradient dqkv [T, (H+2G)·D]; the value heads' gradient stays.

    qkv_raw [T, ≥ (H+G)·D]: the projections before norm and rotation, needed (and read) only with qk-norm.
    Raises ValueError where shapes or types do not fit, dqkv is expanded, or qkv_raw is missing.
    """
    if (q_norm is not None or k_norm is not None) and qkv_raw is None:
        raise ValueError("the backward of qk-norm needs qkv_raw, the projections before the norm")
    return _launch("rope_backward", dqkv, qkv_raw, cos, sin, heads, q_norm, k_norm, eps)


def _launch(
    name: str,
    x: torch.Tensor,
    raw: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: tuple[int, int, int],
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    cache: Cache | None = None,
) -> torch.Tensor:
    h, g, size = heads
    rows = len(x)
    if size % 2:
        raise ValueError(f"head_dim is {size}, but a rotation needs an even one")
    normed = q_norm is not None or k_norm is not None
    if normed and ((q_norm is None and h > 0) or (k_norm is None and g > 0)):
        raise ValueError("q_norm and k_norm are given together, unless there is no head for one of them")
    checks.shape("qkv", x, (rows, (h + 2 * g) * size))
    checks.shape("cos", cos, (rows, size // 2))
    checks.shape("sin", sin, (rows, size // 2))
    checks.floating(qkv=x, cos=cos, sin=sin)
    checks.writable(qkv=x)
    for weight in (q_norm, k_norm):
        if weight is not None:
            checks.shape("q_norm and k_norm", weight, (size,))
            checks.floating(norm=weight)
    source = x if raw is None else raw
    if source.shape[0] != rows or source.shape[1] < (h + g) * size:
        raise ValueError(f"qkv_raw has shape {list(source.shape)}, but needs [{rows}, {(h + g) * size}] at least")
    if cache is not None:
        _check_cache(cache, x, rows, g, size)
    if not rows or not h + g:
        return x
    # a pointer that is never read where there is no norm, or no head for it
    q_weight, k_weight = (cos[0] if w is None else w for w in (q_norm, k_norm))
    wide = any(weight is not None and weight.dtype == torch.float32 for weight in (q_norm, k_norm))
    options = launch.options(name, launch.architecture(x.device), dtype=x.dtype, head_dim=size)
    keys, values, slots = (None, None, None) if cache is None else (cache[0], cache[1], cache[2].contiguous())
    grid = (rows * triton.cdiv(h + g if cache is None else h + 2 * g, options["BLOCK_H"]),)
    launch.run(
        rope_kernel, grid,
        x, source, cos, sin, q_weight, k_weight, keys, values, slots, eps,
        *x.stride(), *source.stride(), *cos.stride(), *sin.stride(), *q_weight.stride(), *k_weight.stride(),
        *((0, 0, 0) if keys is None else keys.stride()), *((0, 0, 0) if values is None else values.stride()),
        H=h, G=g, HALF=size // 2, NORM=normed, WIDE=wide, BACKWARD=name == "rope_backward", STORE=cache is not None,
        BLOCK_D=launch.power_of_two(size // 2), **options,
    )  # fmt: skip
    return x


def _check_cache(cache: Cache, x: torch.Tensor, rows: int, groups: int, size: int) -> None:
    keys, values, slots = cache
    for name, stored in (("keys", keys), ("values", values)):
        checks.shape(name, stored, (len(keys), groups, size))
        if stored.dtype != x.dtype:
            raise ValueError(f"{name} are {stored.dtype} and qkv is {x.dtype}; a KV cache has the type of its tokens")
    checks.shape("slots", slots, (rows,))
    if slots.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"slots are {slots.dtype}; expected int32 or int64")
    checks.writable(keys=keys, values=values)
