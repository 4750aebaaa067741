# mypy: allow-untyped-defs
"""One optimiser step of the prompt: penalty, clipping, AdamW or SGD, trust region, each row's cosine and norm ratio.

Per row e [d] with anchor e0 [d] (Loshchilov and Hutter, arXiv 1711.05101; the regions are our own definitions, those of
maths/trust_region.py, which also hands over their numbers):

    g ← g + λ (e − e0)/‖e0‖²                                λ: the penalty's weight, else 0
    g ← c g,  c = min(1, limit/‖g‖)                         ‖g‖ over all rows
    m ← β₁ m + (1 − β₁) g        v ← β₂ v + (1 − β₂) g²     SGD: m ← μ m + g + ω e
    e ← e − η (m̂/(√v̂ + ε) + ω e)      m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ); SGD: e ← e − η m
    e ← region(e)

With û = e0/‖e0‖, a = e·û, b = ‖e − a û‖ every region returns a combination of the row and its anchor,
e ← α e + β e0 (and, where e stands opposite to e0 and the plane of the two is undefined, γ times the coordinate axis
that û is farthest from), so that only the scalars differ:

    cosine cone   κ (cos θ û + sin θ w/b), w = e − a û, κ = a cos θ + b sin θ    α = κ sin θ/b, β = (κ cos θ − α a)/‖e0‖
    L2 ball       e0 + (e − e0) ρ/‖e − e0‖                                      α = ρ/‖e − e0‖, β = 1 − α
    mean cosine   ‖e‖ (t û + √(1 − t²) w/b), t the level with mean max(cos, t) = τ
    norm band     scales α and β

The dot products and the scalars are fp64, so that the decision whether a row is inside, and a projection that takes the
difference of nearly parallel vectors, do not depend on fp32 rounding; the rest is fp32. A program has one row, which
stays in registers: the step reads and writes it once.

Kernels.
    squares       adds the penalty's gradient; each row's Σ g².
    step          everything but the mean cosine. It leaves e, m and v as they were in `before`.
    mean cosine   couples all rows: every program finds the same level t from their k cosines (Newton on a convex
                  piecewise linear function, monotone from t = τ and finite) and turns its own row.
    settle        puts everything back where the gradient, a row or a moment is not finite.
Nothing waits for the device, and what changes from step to step is read from it: the launches can be captured.
"""

from functools import cache
from typing import Protocol

import torch
import triton
import triton.language as tl

from . import checks, launch


class Region(Protocol):
    """A trust region's numbers, as `embedgrad.maths.trust_region.Numbers` explains them."""

    @property
    def code(self) -> int: ...
    @property
    def tau(self) -> float: ...
    @property
    def inside(self) -> float: ...
    @property
    def cosine(self) -> float: ...
    @property
    def sine(self) -> float: ...
    @property
    def close(self) -> float: ...
    @property
    def norm_min(self) -> float: ...
    @property
    def norm_max(self) -> float: ...
    @property
    def radius(self) -> float: ...
    @property
    def relative(self) -> bool: ...
    @property
    def penalty(self) -> float: ...


NONE, CONE, BALL, MEAN = range(4)
"""The regions that bound something, by the code of trust_region.Numbers."""

TOLERANCE = 2.0**-22
"""Share of a row's length by which fp32 rounding may leave it outside, and that counts as inside (trust_region.py)."""

PARALLEL = 1e-14
"""Share of a row's length below which its part across the anchor is fp64's rounding (trust_region.py)."""

WIDEST = 16384
"""Columns of the widest row that a program can hold."""

_CONE, _BALL, _MEAN = tl.constexpr(CONE), tl.constexpr(BALL), tl.constexpr(MEAN)
_TOLERANCE, _PARALLEL = tl.constexpr(TOLERANCE), tl.constexpr(PARALLEL)


@triton.jit
def _dot(b_x, b_y):
    return tl.sum(b_x.to(tl.float64) * b_y.to(tl.float64))


@triton.jit
def _region(p):
    """The region's numbers in fp64; numbers among a launch's arguments are fp32."""
    tau, inside, cosine, sine = tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3)
    close, norm_min, norm_max, radius = tl.load(p + 4), tl.load(p + 5), tl.load(p + 6), tl.load(p + 7)
    return tau, inside, cosine, sine, close, norm_min, norm_max, radius


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")  # false for NaN


@triton.jit
def _one():
    return tl.full((), 1.0, tl.float64)


@triton.jit
def _far_axis(b_anchor, o_d, mask):
    """(|e0_j|, j) of the first coordinate that the anchor is farthest from."""
    b_size = tl.where(mask, tl.abs(b_anchor), float("inf"))
    least = tl.min(b_size)
    return least, tl.min(tl.where(b_size == least, o_d, 2147483647))


@triton.jit
def _cone(
    ee, ea, aa, bb, u_axis, d, tau, inside_from, cosine, sine, close, norm_min, norm_max,
    HAS_MIN: tl.constexpr, HAS_MAX: tl.constexpr,
):  # fmt: skip
    """α, β, γ of the cosine cone with its norm band; fp64 scalars, ee = ‖e‖², ea = e·e0, aa = ‖e0‖², bb = b²."""
    one = _one()
    length, anchor = tl.sqrt(ee), tl.sqrt(aa)
    a, b = ea / tl.where(anchor > 0, anchor, one), tl.sqrt(bb)
    b = tl.where(b <= _PARALLEL * length, 0.0 * one, b)
    kappa = a * cosine + b * sine
    inside = (a >= inside_from * length) | ((close > 0) & (a > 0) & (b <= close * length))
    alpha, beta, gamma = _turned(kappa * cosine, kappa * sine, a, b, anchor, u_axis)
    lost = (kappa <= 0) | ((b == 0) & (d == 1) & (tau < 0))
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
    one = _one()
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
    one = _one()
    length, anchor = tl.sqrt(ee), tl.sqrt(aa)
    cosine = tl.where(length > 0, ea / tl.where(length > 0, length, one) / tl.where(anchor > 0, anchor, one), 0.0 * one)
    cosine = tl.minimum(tl.maximum(cosine, -one), one)
    tl.store(p_cosine, tl.where(anchor > 0, cosine, one))
    tl.store(p_moved, moved.to(tl.uint8))
    tl.store(p_ratio, tl.where(anchor > 0, length / tl.where(anchor > 0, anchor, one), one))


@triton.jit
def prompt_squares_kernel(
    e_ptr, anchor_ptr, g_ptr, squares_ptr, d, penalty, e_row, anchor_row, g_row, g_col,
    PENALTY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: the penalty's share added to g, and Σ g²."""
    i_k = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < d
    p_g = g_ptr + i_k * g_row + o_d.to(tl.int64) * g_col
    # [BLOCK]
    b_g = tl.load(p_g, mask=m_d, other=0.0)
    if PENALTY:
        b_e = tl.load(e_ptr + i_k * e_row + o_d, mask=m_d, other=0.0)
        b_a = tl.load(anchor_ptr + i_k * anchor_row + o_d, mask=m_d, other=0.0)
        aa = _dot(b_a, b_a)
        b_g += (penalty / tl.where(aa > 0, aa, _one())).to(tl.float32) * (b_e - b_a)
        tl.store(p_g, b_g, mask=m_d)
    tl.store(squares_ptr + i_k, _dot(b_g, b_g))


@triton.jit
def _norm(squares_ptr, k, BLOCK_K: tl.constexpr):
    """‖g‖ over all rows, added in their order."""
    o_k = tl.arange(0, BLOCK_K)
    total = 0.0 * _one()
    for start in range(0, k, BLOCK_K):
        total += tl.sum(tl.load(squares_ptr + start + o_k, mask=start + o_k < k, other=0.0))
    return tl.sqrt(total)


@triton.jit
def _moved(b_e, b_m, b_v, b_g, decay, rate, correction, a1, a2, a3, a4, eps, ADAMW: tl.constexpr):
    """(e, m, v) after the rule. AdamW: a1..a4 = β₁, 1 − β₁, β₂, 1 − β₂; SGD: a1, a2 = momentum, weight decay."""
    if ADAMW:
        b_m = a1 * b_m + a2 * b_g
        b_v = a3 * b_v + a4 * b_g * b_g
        b_e = b_e * decay - rate * b_m / (tl.sqrt_rn(b_v) / correction + eps)
    else:
        b_m = a1 * b_m + (b_g + a2 * b_e)
        b_e = b_e - rate * b_m
    return b_e, b_m, b_v


@triton.jit(do_not_specialize=["k"])
def prompt_step_kernel(
    e_ptr, anchor_ptr, m_ptr, v_ptr, g_ptr, before_ptr, factors_ptr, squares_ptr,
    cosine_ptr, ratio_ptr, moved_ptr, finite_ptr, exact_ptr, region_ptr, k, d, limit, a1, a2, a3, a4, eps,
    e_row, anchor_row, m_row, v_row, g_row, g_col,
    KIND: tl.constexpr, ADAMW: tl.constexpr, HAS_LIMIT: tl.constexpr, RELATIVE: tl.constexpr,
    HAS_MIN: tl.constexpr, HAS_MAX: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: step, project (all regions but the mean cosine), report. before: [3, k, d], e, m and v as they were."""
    tau, inside_from, cosine, sine, close, norm_min, norm_max, radius = _region(region_ptr)
    i_k = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < d
    p_e, p_m, p_v = e_ptr + i_k * e_row + o_d, m_ptr + i_k * m_row + o_d, v_ptr + i_k * v_row + o_d
    # [BLOCK]
    b_e = tl.load(p_e, mask=m_d, other=0.0)
    b_m = tl.load(p_m, mask=m_d, other=0.0)
    b_v = tl.load(p_v, mask=m_d, other=0.0)
    b_g = tl.load(g_ptr + i_k * g_row + o_d.to(tl.int64) * g_col, mask=m_d, other=0.0)
    b_a = tl.load(anchor_ptr + i_k * anchor_row + o_d, mask=m_d, other=0.0)
    p_before, plane = before_ptr + i_k * d + o_d, k.to(tl.int64) * d
    tl.store(p_before, b_e, mask=m_d)
    tl.store(p_before + plane, b_m, mask=m_d)
    tl.store(p_before + 2 * plane, b_v, mask=m_d)
    if HAS_LIMIT:
        norm = _norm(squares_ptr, k, BLOCK_K)
        b_g *= tl.where(norm > limit, limit / norm, _one()).to(tl.float32)
    decay, rate, correction = tl.load(factors_ptr), tl.load(factors_ptr + 1), tl.load(factors_ptr + 2)
    b_e, b_m, b_v = _moved(
        b_e, b_m, b_v, b_g, decay.to(tl.float32), rate.to(tl.float32), correction.to(tl.float32),
        a1, a2, a3, a4, eps, ADAMW,
    )  # fmt: skip
    tl.store(p_m, b_m, mask=m_d)
    tl.store(p_v, b_v, mask=m_d)
    ee, ea, aa = _dot(b_e, b_e), _dot(b_e, b_a), _dot(b_a, b_a)
    alpha, beta, gamma = _one(), 0.0 * _one(), 0.0 * _one()
    _, axis = _far_axis(b_a, o_d, m_d)
    if KIND == _CONE:
        b_w = b_e.to(tl.float64) - ea / tl.where(aa > 0, aa, _one()) * b_a.to(tl.float64)
        u_axis = tl.sum(tl.where(o_d == axis, b_a, 0.0)).to(tl.float64) / tl.where(aa > 0, tl.sqrt(aa), _one())
        alpha, beta, gamma = _cone(
            ee, ea, aa, tl.sum(b_w * b_w), u_axis, d, tau, inside_from, cosine, sine, close, norm_min, norm_max,
            HAS_MIN, HAS_MAX,
        )  # fmt: skip
    if KIND == _BALL:
        b_w = b_e.to(tl.float64) - b_a.to(tl.float64)
        alpha, beta, gamma = _ball(aa, tl.sum(b_w * b_w), radius, RELATIVE)
    if KIND == _MEAN:
        # the next launch needs the cosine of the row as it is here
        tl.store(exact_ptr + i_k, tl.where(aa > 0, ea / tl.where(ee * aa > 0, tl.sqrt(ee) * tl.sqrt(aa), _one()), 2.0))
    b_e = _placed(b_e, b_a, alpha, beta, gamma, o_d, axis)
    tl.store(p_e, b_e, mask=m_d)
    m_finite = _is_finite(b_e) & _is_finite(b_m) & _is_finite(b_v)
    tl.store(finite_ptr + i_k, tl.min(tl.where(m_d, m_finite.to(tl.int32), 1)).to(tl.uint8))
    moved = (alpha != 1) | (beta != 0) | (gamma != 0)
    _report(cosine_ptr + i_k, ratio_ptr + i_k, moved_ptr + i_k, _dot(b_e, b_e), _dot(b_e, b_a), aa, moved)


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
def prompt_mean_cosine_kernel(
    e_ptr, anchor_ptr, exact_ptr, cosine_ptr, ratio_ptr, moved_ptr, region_ptr, k, d, e_row, anchor_row,
    BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: turned to the common level where its cosine is below."""
    i_k = tl.program_id(0).to(tl.int64)
    own = tl.load(exact_ptr + i_k)
    level, turn = _level(exact_ptr, k, tl.load(region_ptr), BLOCK_K)
    if turn & (own < level):
        o_d = tl.arange(0, BLOCK)
        m_d = o_d < d
        p_e = e_ptr + i_k * e_row + o_d
        # [BLOCK]
        b_e = tl.load(p_e, mask=m_d, other=0.0)
        b_a = tl.load(anchor_ptr + i_k * anchor_row + o_d, mask=m_d, other=0.0)
        ee, ea, aa = _dot(b_e, b_e), _dot(b_e, b_a), _dot(b_a, b_a)
        _, axis = _far_axis(b_a, o_d, m_d)
        b_w = b_e.to(tl.float64) - ea / aa * b_a.to(tl.float64)
        one, length, anchor, b = _one(), tl.sqrt(ee), tl.sqrt(aa), tl.sqrt(tl.sum(b_w * b_w))
        b = tl.where(b <= _PARALLEL * length, 0.0 * one, b)
        u_axis = tl.sum(tl.where(o_d == axis, b_a, 0.0)).to(tl.float64) / anchor
        sine = tl.sqrt(tl.maximum(1 - level * level, 0.0 * one))
        alpha, beta, gamma = _turned(length * level, length * sine, ea / anchor, b, anchor, u_axis)
        # no plane to turn in: the anchor itself
        lost = (length == 0) | ((b == 0) & (d == 1) & (level < 1))
        alpha, beta = tl.where(lost, 0.0 * one, alpha), tl.where(lost, one, beta)
        gamma = tl.where(lost, 0.0 * one, gamma)
        b_e = _placed(b_e, b_a, alpha, beta, gamma, o_d, axis)
        tl.store(p_e, b_e, mask=m_d)
        _report(cosine_ptr + i_k, ratio_ptr + i_k, moved_ptr + i_k, _dot(b_e, b_e), _dot(b_e, b_a), aa, turn)


@triton.jit(do_not_specialize=["k"])
def prompt_settle_kernel(
    e_ptr, m_ptr, v_ptr, before_ptr, squares_ptr, finite_ptr, alive_ptr, norm_ptr, moved_ptr, k, d, e_row, m_row, v_row,
    BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """alive ← alive and everything finite; one row put back where it is not. Program 0 writes alive and ‖g‖.

    A program that reads alive after program 0 wrote it comes to the same result.
    """
    i_k = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    norm = _norm(squares_ptr, k, BLOCK_K)
    alive = (tl.load(alive_ptr) != 0) & _is_finite(norm)
    for start in range(0, k, BLOCK_K):
        alive = alive & (tl.min(tl.load(finite_ptr + start + o_k, mask=start + o_k < k, other=1).to(tl.int32)) > 0)
    if i_k == 0:
        tl.store(norm_ptr, norm)
        tl.store(alive_ptr, alive.to(tl.uint8))
    if not alive:
        o_d = tl.arange(0, BLOCK)
        m_d = o_d < d
        p_before, plane = before_ptr + i_k * d + o_d, k.to(tl.int64) * d
        tl.store(e_ptr + i_k * e_row + o_d, tl.load(p_before, mask=m_d), mask=m_d)
        tl.store(m_ptr + i_k * m_row + o_d, tl.load(p_before + plane, mask=m_d), mask=m_d)
        tl.store(v_ptr + i_k * v_row + o_d, tl.load(p_before + 2 * plane, mask=m_d), mask=m_d)
        tl.store(moved_ptr + i_k, alive.to(tl.uint8))


@cache  # captured launches know the addresses
def _on_device(numbers: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def prompt_step(
    e: torch.Tensor,
    e0: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    factors: torch.Tensor,
    adamw: bool,
    constants: tuple[float, ...],
    region: Region,
    clip_norm: float | None,
    before: torch.Tensor,
    alive: torch.Tensor,
    cosine: torch.Tensor,
    norm_ratio: torch.Tensor,
    projected: torch.Tensor,
    norm: torch.Tensor,
) -> None:
    """One step of e, m, v [k, d] in place; e0, g [k, d] likewise float32, g with any strides and used up.

    factors [3] float64 on the device: 1 − lr·weight_decay, lr/(1 − β₁ᵗ) and √(1 − β₂ᵗ) (SGD: only the rate counts).
    adamw: else SGD. constants: (β₁, 1 − β₁, β₂, 1 − β₂, ε), for SGD (momentum, weight decay, 0, 0, 0). region: the
    fields of `embedgrad.maths.trust_region.Numbers`. clip_norm: largest norm of the gradient. before [3, k, d] float32:
    receives e, m and v as they were. alive [] bool: see `embedgrad.maths.optimizer.prompt_step`. cosine, norm_ratio
    [k] and norm [] float64, projected [k] bool: what it reports.

    Raises ValueError where shapes or types do not fit, or a row is wider than WIDEST.
    """
    k, d = e.shape
    for name, x in {"e": e, "e0": e0, "m": m, "v": v, "g": g}.items():
        checks.shape(name, x, (k, d))
        if x.dtype != torch.float32:
            raise ValueError(f"{name} holds {x.dtype}, but the prompt's master copy and its step are float32")
        if x is not g and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"the last dimension of {name} must be contiguous; its stride is {x.stride(-1)}")
    if d > WIDEST:
        raise ValueError(f"the prompt's rows have {d} columns; a program holds at most {WIDEST}")
    checks.shape("before", before, (3, k, d))
    for name, x, dtype in (("cosine", cosine, torch.float64), ("norm_ratio", norm_ratio, torch.float64),
                           ("projected", projected, torch.bool)):  # fmt: skip
        checks.shape(name, x, (k,))
        if x.dtype != dtype:
            raise ValueError(f"{name} holds {x.dtype}, but must hold {dtype}")
    checks.writable(e=e, m=m, v=v, cosine=cosine, norm_ratio=norm_ratio, projected=projected, before=before)
    n = region
    options = launch.options("prompt_step", launch.architecture(e.device), dtype=e.dtype, width=d)
    squares, exact = torch.empty(2, k, dtype=torch.float64, device=e.device)
    numbers = _on_device((n.tau, n.inside, n.cosine, n.sine, n.close, n.norm_min, n.norm_max, n.radius), e.device)
    moved, finite = projected.view(torch.uint8), torch.empty(k, dtype=torch.uint8, device=e.device)
    launch.run(
        prompt_squares_kernel, (k,),
        e, e0, g, squares, d, n.penalty, e.stride(0), e0.stride(0), *g.stride(), PENALTY=n.penalty > 0, **options
    )  # fmt: skip
    launch.run(
        prompt_step_kernel, (k,),
        e, e0, m, v, g, before, factors, squares, cosine, norm_ratio, moved, finite, exact, numbers, k, d,
        0.0 if clip_norm is None else clip_norm, *constants,
        e.stride(0), e0.stride(0), m.stride(0), v.stride(0), *g.stride(),
        KIND=n.code, ADAMW=adamw, HAS_LIMIT=clip_norm is not None, RELATIVE=n.relative,
        HAS_MIN=n.norm_min >= 0, HAS_MAX=n.norm_max >= 0, BLOCK_K=128, **options,
    )  # fmt: skip
    if n.code == MEAN:
        launch.run(
            prompt_mean_cosine_kernel, (k,),
            e, e0, exact, cosine, norm_ratio, moved, numbers, k, d, e.stride(0), e0.stride(0), BLOCK_K=128, **options
        )  # fmt: skip
    launch.run(
        prompt_settle_kernel, (k,),
        e, m, v, before, squares, finite, alive.view(torch.uint8), norm, moved, k, d,
        e.stride(0), m.stride(0), v.stride(0), BLOCK_K=128, **options,
    )  # fmt: skip
