# mypy: allow-untyped-defs
"""One optimiser step of the prompt in one pass: AdamW, trust region, and each row's cosine and norm ratio.

Per row e [d] with anchor e0 [d] (Loshchilov and Hutter, arXiv 1711.05101; the regions are our definitions, the same as
embedgrad/trust_region.py states them):

    g ← c (g + λ (e − e0)/‖e0‖²)                            c: clip scale on the device; λ: the penalty's weight, else 0
    m ← β₁ m + (1 − β₁) g        v ← β₂ v + (1 − β₂) g²
    e ← e − η (m̂/(√v̂ + ε) + ω e)                            m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ)
    e ← region(e)

With û = e0/‖e0‖, a = e·û, b = ‖e − a û‖ every region returns a combination of the row and its anchor,
e ← α e + β e0 (and, where e stands opposite to e0 and the plane of the two is undefined, γ times the coordinate axis
that û is farthest from), so that only the scalars differ:

    cosine cone   κ (τ û + s w/b), w = e − a û, s = √(1 − τ²), κ = a τ + b s      α = κ s/b, β = (κ τ − α a)/‖e0‖
    L2 ball       e0 + (e − e0) ρ/‖e − e0‖                                      α = ρ/‖e − e0‖, β = 1 − α
    mean cosine   ‖e‖ (t û + √(1 − t²) w/b), t the level with mean max(cos, t) = τ
    norm band     scales α and β

The dot products and the scalars are fp64, so that the decision whether a row is inside, and a projection that takes the
difference of nearly parallel vectors, do not depend on fp32 rounding; the rest is fp32. A row is read and written once
(8 · k · d · 4 bytes) where it fits one block; a wider one is walked three times, in a fixed order.

The mean cosine couples all rows, so it takes a second launch: the first steps and leaves each row's cosine, the second
has every program find the same level t from those k numbers (Newton on a convex piecewise linear function, monotone
from t = τ and finite) and turn its own row.

The kernel writes what it reads: it is never autotuned.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from . import checks, launch

KINDS = {"none": 0, "penalty": 0, "cosine": 1, "l2_ball": 2, "mean_cosine": 3}
"""The regions by trust_region.py's names; a penalty bounds nothing, it joins the gradient."""

TOLERANCE = 2.0**-22
"""Share of a row's length by which fp32 rounding may leave it outside, and that counts as inside (trust_region.py)."""

PARALLEL = 1e-14
"""Share of a row's length below which its part across the anchor is fp64's rounding (trust_region.py)."""

_NONE, _CONE, _BALL, _MEAN = (tl.constexpr(i) for i in range(4))
_TOLERANCE, _PARALLEL = tl.constexpr(TOLERANCE), tl.constexpr(PARALLEL)


@triton.jit
def _dot(b_x, b_y):
    return tl.sum(b_x.to(tl.float64) * b_y.to(tl.float64))


@triton.jit
def _adamw(
    p_e, p_m, p_v, p_g, b_anchor, mask, clip, pull, beta1, beta2, rest1, rest2, rate, correction, eps, decay
):  # fmt: skip
    """The stepped row block [BLOCK]; stores the moments."""
    b_e = tl.load(p_e, mask=mask, other=0.0)
    b_g = (tl.load(p_g, mask=mask, other=0.0) + pull * (b_e - b_anchor)) * clip
    b_m = beta1 * tl.load(p_m, mask=mask, other=0.0) + rest1 * b_g
    b_v = beta2 * tl.load(p_v, mask=mask, other=0.0) + rest2 * b_g * b_g
    tl.store(p_m, b_m, mask=mask)
    tl.store(p_v, b_v, mask=mask)
    return b_e * decay - rate * b_m / (tl.sqrt_rn(b_v) * correction + eps)


@triton.jit
def _far_axis(b_anchor, o_d, mask):
    """(|e0_j|, j) of the first coordinate that the anchor is farthest from."""
    b_size = tl.where(mask, tl.abs(b_anchor), float("inf"))
    least = tl.min(b_size)
    return least, tl.min(tl.where(b_size == least, o_d, 2147483647))


@triton.jit
def _cone(ee, ea, aa, bb, u_axis, d, tau, s, norm_min, norm_max, HAS_MIN: tl.constexpr, HAS_MAX: tl.constexpr):
    """α, β, γ of the cosine cone with its norm band; fp64 scalars, ee = ‖e‖², ea = e·e0, aa = ‖e0‖², bb = b²."""
    one = tl.full((), 1.0, tl.float64)
    length, anchor = tl.sqrt(ee), tl.sqrt(aa)
    a, b = ea / tl.where(anchor > 0, anchor, one), tl.sqrt(bb)
    b = tl.where(b <= _PARALLEL * length, 0.0 * one, b)
    kappa = a * tau + b * s
    close = (kappa > 0) & (b * tau - a * s <= _TOLERANCE * length)
    inside = (a >= tau * length) | close | (tau <= -1)
    alpha, beta, gamma = _turned(kappa * tau, kappa * s, a, b, anchor, u_axis)
    lost = (kappa <= 0) | ((b == 0) & (d == 1))
    alpha = tl.where(inside, one, tl.where(lost, 0.0 * one, alpha))
    beta = tl.where(inside | lost, 0.0 * one, beta)
    gamma = tl.where(inside | lost, 0.0 * one, gamma)
    length = tl.where(inside, length, tl.where(lost, 0.0 * one, kappa))
    if HAS_MAX:
        ceiling = norm_max * anchor
        shrink = tl.where(length > ceiling * (1 + _TOLERANCE), ceiling / tl.where(length > 0, length, one), one)
        alpha, beta, gamma, length = alpha * shrink, beta * shrink, gamma * shrink, length * shrink
    if HAS_MIN:
        floor = norm_min * anchor
        low = length < floor * (1 - _TOLERANCE)
        grow = tl.where(low, floor / tl.where(length > 0, length, one), one)
        alpha, beta, gamma = alpha * grow, beta * grow, gamma * grow
        ray = low & (length == 0)
        alpha, beta = tl.where(ray, 0.0 * one, alpha), tl.where(ray, norm_min * one, beta)
    directed = anchor > 0
    return tl.where(directed, alpha, one), tl.where(directed, beta, 0.0 * one), tl.where(directed, gamma, 0.0 * one)


@triton.jit
def _turned(along, across, a, b, anchor, u_axis):
    """α, β, γ of along · û + across · (unit vector across û towards e, or towards the far axis where b = 0)."""
    one = tl.full((), 1.0, tl.float64)
    anchor = tl.where(anchor > 0, anchor, one)
    plane = b > 0
    alpha = tl.where(plane, across / tl.where(plane, b, one), 0.0 * one)
    sine = tl.sqrt(tl.maximum(1 - u_axis * u_axis, 0.0 * one))
    gamma = tl.where(plane, 0.0 * one, across / tl.where(sine > 0, sine, one))
    return alpha, (along - alpha * a - gamma * u_axis) / anchor, gamma


@triton.jit
def _ball(aa, distance2, radius, RELATIVE: tl.constexpr):
    one = tl.full((), 1.0, tl.float64)
    anchor, distance = tl.sqrt(aa), tl.sqrt(distance2)
    bound = one * radius
    if RELATIVE:
        bound = bound * anchor
    outside = distance > bound + _TOLERANCE * (anchor + bound)
    alpha = tl.where(outside, bound / tl.where(distance > 0, distance, one), one)
    return alpha, 1 - alpha, 0.0 * one


@triton.jit
def _placed(b_e, b_anchor, alpha, beta, gamma, o_d, axis):
    """round(α e + β e0 + γ axis); the row's own bits where α = 1 and β = γ = 0."""
    b_new = alpha * b_e.to(tl.float64) + beta * b_anchor.to(tl.float64)
    return (b_new + tl.where(o_d == axis, gamma, 0.0 * gamma)).to(tl.float32)


@triton.jit
def _report(p_cosine, p_ratio, p_moved, ee, ea, aa, moved):
    """Cosine (0 where e = 0, 1 where e0 = 0) and ‖e‖/‖e0‖ (1 where e0 = 0) of the finished row."""
    one = tl.full((), 1.0, tl.float64)
    length, anchor = tl.sqrt(ee), tl.sqrt(aa)
    cosine = tl.where(length > 0, ea / tl.where(length > 0, length, one) / tl.where(anchor > 0, anchor, one), 0.0 * one)
    cosine = tl.minimum(tl.maximum(cosine, -one), one)
    tl.store(p_cosine, tl.where(anchor > 0, cosine, one).to(tl.float32))
    tl.store(p_moved, moved.to(tl.uint8))
    tl.store(p_ratio, tl.where(anchor > 0, length / tl.where(anchor > 0, anchor, one), one).to(tl.float32))


@triton.jit
def prompt_step_kernel(
    e_ptr, anchor_ptr, m_ptr, v_ptr, g_ptr, clip_ptr, cosine_ptr, ratio_ptr, moved_ptr, exact_ptr,
    d, beta1, beta2, rest1, rest2, rate, correction, eps, decay, penalty, tau, s, norm_min, norm_max, radius,
    e_row, anchor_row, m_row, v_row, g_row, g_col,
    KIND: tl.constexpr, HAS_CLIP: tl.constexpr, PENALTY: tl.constexpr, RELATIVE: tl.constexpr,
    HAS_MIN: tl.constexpr, HAS_MAX: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: step, project (all regions but the mean cosine), report."""
    i_k = tl.program_id(0).to(tl.int64)
    p_e, p_a, p_g = e_ptr + i_k * e_row, anchor_ptr + i_k * anchor_row, g_ptr + i_k * g_row
    p_m, p_v = m_ptr + i_k * m_row, v_ptr + i_k * v_row
    o_d = tl.arange(0, BLOCK)
    clip = 1.0
    if HAS_CLIP:
        clip = tl.load(clip_ptr).to(tl.float32)
    aa = tl.full((), 0.0, tl.float64)
    pull = 0.0
    if ONE_BLOCK:
        m_d = o_d < d
        b_a = tl.load(p_a + o_d, mask=m_d, other=0.0)
        aa = _dot(b_a, b_a)
        least, axis = _far_axis(b_a, o_d, m_d)
    else:
        least, axis = float("inf"), 2147483647
        for start in range(0, d, BLOCK):
            o_n = start + o_d
            b_a = tl.load(p_a + o_n, mask=o_n < d, other=0.0)
            aa += _dot(b_a, b_a)
            low, at = _far_axis(b_a, o_n, o_n < d)
            axis = tl.where(low < least, at, axis)
            least = tl.minimum(low, least)
    if PENALTY:
        pull = (penalty / tl.where(aa > 0, aa, tl.full((), 1.0, tl.float64))).to(tl.float32)
    ee, ea = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    if ONE_BLOCK:
        b_e = _adamw(
            p_e + o_d, p_m + o_d, p_v + o_d, p_g + o_d.to(tl.int64) * g_col, b_a, m_d,
            clip, pull, beta1, beta2, rest1, rest2, rate, correction, eps, decay,
        )  # fmt: skip
        ee, ea = _dot(b_e, b_e), _dot(b_e, b_a)
    else:
        for start in range(0, d, BLOCK):
            o_n = start + o_d
            b_a = tl.load(p_a + o_n, mask=o_n < d, other=0.0)
            b_e = _adamw(
                p_e + o_n, p_m + o_n, p_v + o_n, p_g + o_n.to(tl.int64) * g_col, b_a, o_n < d,
                clip, pull, beta1, beta2, rest1, rest2, rate, correction, eps, decay,
            )  # fmt: skip
            tl.store(p_e + o_n, b_e, mask=o_n < d)
            ee += _dot(b_e, b_e)
            ea += _dot(b_e, b_a)
        tl.debug_barrier()
    alpha, beta, gamma = _unmoved()
    if (KIND == _CONE) | (KIND == _BALL):
        # the part of e across its anchor, or the offset from it
        share = 1.0 * alpha
        if KIND == _CONE:
            share = ea / tl.where(aa > 0, aa, alpha)
        bb = 0.0 * alpha
        if ONE_BLOCK:
            b_w = b_e.to(tl.float64) - share * b_a.to(tl.float64)
            bb = tl.sum(b_w * b_w)
        else:
            for start in range(0, d, BLOCK):
                o_n = start + o_d
                b_w = tl.load(p_e + o_n, mask=o_n < d, other=0.0).to(tl.float64)
                b_w -= share * tl.load(p_a + o_n, mask=o_n < d, other=0.0).to(tl.float64)
                bb += tl.sum(b_w * b_w)
        if KIND == _CONE:
            u_axis = tl.load(p_a + axis).to(tl.float64) / tl.where(aa > 0, tl.sqrt(aa), alpha)
            alpha, beta, gamma = _cone(
                ee, ea, aa, bb, u_axis, d, tau, s, norm_min, norm_max, HAS_MIN, HAS_MAX
            )  # fmt: skip
        else:
            alpha, beta, gamma = _ball(aa, bb, radius, RELATIVE)
    if KIND == _MEAN:
        # the second launch needs the cosine as it is, without the rounding to fp32
        tl.store(exact_ptr + i_k, tl.where(aa > 0, ea / tl.where(ee * aa > 0, tl.sqrt(ee) * tl.sqrt(aa), alpha), 2.0))
    ee, ea = 0.0 * alpha, 0.0 * alpha
    if ONE_BLOCK:
        b_e = _placed(b_e, b_a, alpha, beta, gamma, o_d, axis)
        tl.store(p_e + o_d, b_e, mask=m_d)
        ee, ea = _dot(b_e, b_e), _dot(b_e, b_a)
    else:
        for start in range(0, d, BLOCK):
            o_n = start + o_d
            b_a = tl.load(p_a + o_n, mask=o_n < d, other=0.0)
            b_e = _placed(tl.load(p_e + o_n, mask=o_n < d, other=0.0), b_a, alpha, beta, gamma, o_n, axis)
            tl.store(p_e + o_n, b_e, mask=o_n < d)
            ee += _dot(b_e, b_e)
            ea += _dot(b_e, b_a)
    _report(cosine_ptr + i_k, ratio_ptr + i_k, moved_ptr + i_k, ee, ea, aa, (alpha != 1) | (beta != 0) | (gamma != 0))


@triton.jit
def _unmoved():
    one = tl.full((), 1.0, tl.float64)
    return one, 0.0 * one, 0.0 * one


@triton.jit
def _level(exact_ptr, k, tau, BLOCK_K: tl.constexpr):
    """(t, whether rows must turn): mean max(cos, t) = τ over the rows that have a direction (cosine ≤ 1)."""
    one = tl.full((), 1.0, tl.float64)
    o_k = tl.arange(0, BLOCK_K)
    total, count, sines = 0.0 * one, 0.0 * one, 0.0 * one
    for start in range(0, k, BLOCK_K):
        b_c = tl.load(exact_ptr + start + o_k, mask=start + o_k < k, other=2.0)
        m_c = b_c <= 1.5
        total += tl.sum(tl.where(m_c, b_c, 0.0 * b_c))
        sines += tl.sum(tl.where(m_c, tl.sqrt(tl.maximum(1 - b_c * b_c, 0.0 * b_c)), 0.0 * b_c))
        count += tl.sum(tl.where(m_c, 1.0 + 0.0 * b_c, 0.0 * b_c))
    count = tl.maximum(count, one)
    turn = total / count < tau - _TOLERANCE * (sines / count) - _TOLERANCE * _TOLERANCE
    level, before = tau * one, 2.0 * one
    while turn & (level < before):
        above, low = 0.0 * one, 0.0 * one
        for start in range(0, k, BLOCK_K):
            b_c = tl.load(exact_ptr + start + o_k, mask=start + o_k < k, other=2.0)
            b_raised = b_c < level
            above += tl.sum(tl.where((b_c <= 1.5) & (b_c >= level), b_c, 0.0 * b_c))
            low += tl.sum(tl.where(b_raised, 1.0 + 0.0 * b_c, 0.0 * b_c))
        before = level
        level = tl.where(low > 0, (count * tau - above) / tl.maximum(low, one), level)
    return tl.minimum(before, one), turn


@triton.jit(do_not_specialize=["k"])
def mean_cosine_kernel(
    e_ptr, anchor_ptr, exact_ptr, cosine_ptr, ratio_ptr, moved_ptr, k, d, tau, e_row, anchor_row,
    BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of the second launch: turn it to the common level where its cosine is below."""
    i_k = tl.program_id(0).to(tl.int64)
    own = tl.load(exact_ptr + i_k)
    level, turn = _level(exact_ptr, k, tau, BLOCK_K)
    if turn & (own < level):
        p_e, p_a = e_ptr + i_k * e_row, anchor_ptr + i_k * anchor_row
        o_d = tl.arange(0, BLOCK)
        one = tl.full((), 1.0, tl.float64)
        ee, ea, aa, bb = 0.0 * one, 0.0 * one, 0.0 * one, 0.0 * one
        least, axis = float("inf"), 2147483647
        for start in range(0, d, BLOCK):
            o_n = start + o_d
            b_e = tl.load(p_e + o_n, mask=o_n < d, other=0.0)
            b_a = tl.load(p_a + o_n, mask=o_n < d, other=0.0)
            ee, ea, aa = ee + _dot(b_e, b_e), ea + _dot(b_e, b_a), aa + _dot(b_a, b_a)
            low, at = _far_axis(b_a, o_n, o_n < d)
            axis = tl.where(low < least, at, axis)
            least = tl.minimum(low, least)
        for start in range(0, d, BLOCK):
            o_n = start + o_d
            b_w = tl.load(p_e + o_n, mask=o_n < d, other=0.0).to(tl.float64)
            b_w -= ea / aa * tl.load(p_a + o_n, mask=o_n < d, other=0.0).to(tl.float64)
            bb += tl.sum(b_w * b_w)
        length, anchor, b = tl.sqrt(ee), tl.sqrt(aa), tl.sqrt(bb)
        b = tl.where(b <= _PARALLEL * length, 0.0 * one, b)
        u_axis = tl.load(p_a + axis).to(tl.float64) / anchor
        sine = tl.sqrt(tl.maximum(1 - level * level, 0.0 * one))
        alpha, beta, gamma = _turned(length * level, length * sine, ea / anchor, b, anchor, u_axis)
        # no plane to turn in: the anchor itself
        lost = (length == 0) | ((b == 0) & (d == 1) & (level < 1))
        alpha, beta = tl.where(lost, 0.0 * one, alpha), tl.where(lost, one, beta)
        gamma = tl.where(lost, 0.0 * one, gamma)
        ee, ea = 0.0 * one, 0.0 * one
        for start in range(0, d, BLOCK):
            o_n = start + o_d
            b_a = tl.load(p_a + o_n, mask=o_n < d, other=0.0)
            b_e = _placed(tl.load(p_e + o_n, mask=o_n < d, other=0.0), b_a, alpha, beta, gamma, o_n, axis)
            tl.store(p_e + o_n, b_e, mask=o_n < d)
            ee, ea = ee + _dot(b_e, b_e), ea + _dot(b_e, b_a)
        _report(cosine_ptr + i_k, ratio_ptr + i_k, moved_ptr + i_k, ee, ea, aa, turn)


def prompt_step(
    e: torch.Tensor,
    e0: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: torch.Tensor | None = None,
    region: Mapping[str, Any],
    cosine: torch.Tensor,
    norm_ratio: torch.Tensor,
    projected: torch.Tensor,
) -> None:
    """One AdamW step of e [k, d] into the trust region around e0 [k, d]; e, m, v are updated in place.

    e, e0, m, v, g float32 (rows contiguous; g any strides). step: 1 for the first. lr: learning rate.
    clip: one-element tensor on the device that scales the gradient (with the penalty's share), or None.
    region: {"kind": "cosine", "tau": 0.95, "norm_min": None, "norm_max": None}, {"kind": "l2_ball", "radius": r,
    "relative": bool}, {"kind": "mean_cosine", "tau": t}, {"kind": "penalty", "weight": w} or {"kind": "none"}, as
    trust_region.py's `describe` gives them.
    cosine, norm_ratio [k] float32, written: cos(e, e0) (0 where e = 0, 1 where e0 = 0) and ‖e‖/‖e0‖ (1 where e0 = 0).
    projected [k] bool, written: whether the region moved the row.
    Raises ValueError where shapes, types or the region do not fit.
    """
    k, d = e.shape
    for name, x in (("e0", e0), ("m", m), ("v", v), ("g", g)):
        checks.shape(name, x, (k, d))
    for name, x in (("e", e), ("e0", e0), ("m", m), ("v", v), ("g", g), ("cosine", cosine), ("norm_ratio", norm_ratio)):
        if x.dtype != torch.float32:
            raise ValueError(f"{name} holds {x.dtype}, but the prompt's master copy and its step are float32")
        if x is not g and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"the last dimension of {name} must be contiguous; its stride is {x.stride(-1)}")
    checks.shape("cosine", cosine, (k,))
    checks.shape("norm_ratio", norm_ratio, (k,))
    checks.shape("projected", projected, (k,))
    if projected.dtype != torch.bool:
        raise ValueError(f"projected holds {projected.dtype}, but must hold bool")
    checks.writable(e=e, m=m, v=v, cosine=cosine, norm_ratio=norm_ratio, projected=projected)
    moved = projected.view(torch.uint8)
    kind = str(region["kind"])
    if kind not in KINDS:
        raise ValueError(f"there is no trust region {kind!r}; there are {', '.join(KINDS)}")
    beta1, beta2 = betas
    tau = float(region.get("tau", 0.0))
    norm_min, norm_max = region.get("norm_min"), region.get("norm_max")
    options = launch.options("prompt_step", launch.architecture(e.device), dtype=e.dtype, width=d)
    exact = torch.empty(k if kind == "mean_cosine" else 0, dtype=torch.float64, device=e.device)
    prompt_step_kernel[(k,)](
        e, e0, m, v, g, cosine if clip is None else clip, cosine, norm_ratio, moved, exact,
        d, beta1, beta2, 1 - beta1, 1 - beta2, lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), eps,
        1 - lr * weight_decay, float(region.get("weight", 0.0)), tau, math.sqrt(max(0.0, 1 - tau * tau)),
        float(norm_min or 0.0), float(norm_max or 0.0), float(region.get("radius", 0.0)),
        e.stride(0), e0.stride(0), m.stride(0), v.stride(0), *g.stride(),
        KIND=KINDS[kind], HAS_CLIP=clip is not None, PENALTY=kind == "penalty",
        RELATIVE=bool(region.get("relative", True)), HAS_MIN=norm_min is not None, HAS_MAX=norm_max is not None,
        ONE_BLOCK=options["BLOCK"] >= d, **options,
    )  # fmt: skip
    if kind == "mean_cosine":
        mean_cosine_kernel[(k,)](
            e, e0, exact, cosine, norm_ratio, moved, k, d, tau, e.stride(0), e0.stride(0), BLOCK_K=128, **options
        )  # fmt: skip
