# mypy: allow-untyped-defs
"""Loss, arg-max and gradient of rows of logits, in place; the products before and after are cuBLAS's.

For a row with logits z_v (or cap·tanh(z_v/cap)), target t and weight w, and the softmax q *over the other tokens*,

    M = max_{v≠t} z_v      s = Σ_{v≠t} exp(z_v − M)      q_v = exp(z_v − M)/s      gap = M + log s − z_t

    nll = log(1 + exp(gap))                    1 − p_t = σ(gap)
    dz_v = w σ(gap) q_v z′_v  (v ≠ t)          dz_t = −w σ(gap) z′_t

where z′ = 1, or 1 − (z/cap)² with a softcap. This is w (p_v − [v = t]) z′_v with the target taken out of the sum:
p_t − 1 is never a difference of nearly equal numbers, so a confident row keeps a gradient (and a loss) of full relative
precision, where softmax − one-hot rounds to nothing.

A row is read twice: once for M, s and the arg-max, once for dz. In the first walk every lane keeps a maximum and a sum
of its own (Milakov and Gimelshein, arXiv 1805.02867, algorithm 3), so that nothing is reduced across lanes before the
end. dz overwrites the row's own logits, in a type of at most their size: a block's dz lies below the logits that are
still to be read. PROGRAMS rows are worked on at once.
"""

import torch
import triton
import triton.language as tl

from . import checks, launch

_LOG2E = tl.constexpr(1.4426950408889634)
_FP16_SCALE = tl.constexpr(2.0**15)
"""float16 gradients are stored as q · 2¹⁵, without the row's factor: small ones must not underflow."""


@triton.jit
def _tanh(x):
    small = x * (1.0 - x * x * (1.0 / 3.0 - x * x * (2.0 / 15.0)))
    return tl.where(tl.abs(x) < 0.06, small, 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x)))


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2E)


@triton.jit
def _capped(z, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        z = softcap * _tanh(z / softcap)
    return z


@triton.jit
def _slope(z, softcap, SOFTCAP: tl.constexpr):
    """dz/dx of a capped logit z."""
    if SOFTCAP:
        return 1.0 - (z / softcap) * (z / softcap)
    else:
        return z * 0.0 + 1.0


@triton.jit
def _others(z_ptr, target, V, softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """(M, s, the lowest arg-max) over the tokens of a row that are not the target."""
    o_b = tl.arange(0, BLOCK)
    # [BLOCK]
    b_m = tl.full((BLOCK,), float("-inf"), tl.float32)
    b_s = tl.zeros((BLOCK,), tl.float32)
    b_best = tl.zeros((BLOCK,), tl.int32) + V
    for first in range(0, V, BLOCK):
        o_v = first + o_b
        b_z = tl.load(z_ptr + o_v, mask=o_v < V, other=float("-inf"))
        b_z = tl.where((o_v == target) | (o_v >= V), float("-inf"), _capped(b_z, softcap, SOFTCAP))
        b_best = tl.where(b_z > b_m, o_v, b_best)
        b_new = tl.maximum(b_m, b_z)
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)  # −inf − (−inf) would be NaN
        b_s = b_s * _exp(b_m - b_base) + _exp(b_z - b_base)
        b_m = b_new
    maximum = tl.max(b_m, 0)
    base = tl.where(maximum == float("-inf"), 0.0, maximum)
    mass = tl.sum(b_s * _exp(b_m - base), 0)
    best = tl.min(tl.where(b_m == maximum, b_best, V), 0)
    return maximum, mass, tl.where(best == V, 0, best)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) without cancellation: the rounding of 1 + y cancels in y/((1 + y) − 1)."""
    small = _exp(-tl.abs(x))
    one = 1.0 + small
    log = tl.where(one == 1.0, small, tl.log(one) * (small / tl.where(one == 1.0, 1.0, one - 1.0)))
    return tl.maximum(x, 0.0) + log


@triton.jit
def _store_gradient(
    z_ptr, dz_ptr, target, maximum, of_others, of_target, V, softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr
):
    """dz = of_others · exp(z − M) z′, and of_target · z′ at the target; 0 everywhere where of_target is 0."""
    o_b = tl.arange(0, BLOCK)
    for first in range(0, V, BLOCK):
        o_v = first + o_b
        b_z = _capped(tl.load(z_ptr + o_v, mask=o_v < V, other=0.0), softcap, SOFTCAP)
        b_dz = tl.where(o_v == target, of_target, of_others * _exp(b_z - maximum)) * _slope(b_z, softcap, SOFTCAP)
        b_dz = tl.where(of_target == 0.0, 0.0, b_dz)
        tl.debug_barrier()  # every lane has read this block before a lane writes below it
        tl.store(dz_ptr + o_v, b_dz.to(dz_ptr.dtype.element_ty), mask=o_v < V)


@triton.jit(do_not_specialize=["N"])
def softmax_loss_kernel(
    z_ptr, dz_ptr, target_ptr, weight_ptr, nll_ptr, predicted_ptr, factor_ptr,
    N, V, softcap, z_row, dz_row, target_step, weight_step,
    GRADIENT: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (programs): each takes every programs-th row. SCALED: dz lacks each row's factor; see `softmax_loss`."""
    for row in range(tl.program_id(0), N, tl.num_programs(0)):
        i_n = tl.full((), row, tl.int64)
        p_z = z_ptr + i_n * z_row
        target = tl.load(target_ptr + i_n * target_step).to(tl.int32)
        counts = target >= 0
        maximum, mass, best = _others(p_z, target, V, softcap, SOFTCAP, BLOCK)
        of_target = _capped(tl.load(p_z + tl.maximum(target, 0)), softcap, SOFTCAP)
        gap = maximum + tl.log2(mass) / _LOG2E - of_target
        tl.store(nll_ptr + i_n, tl.where(counts, _softplus(gap), 0.0))
        is_best = counts & ((of_target > maximum) | ((of_target == maximum) & (target < best)))
        tl.store(predicted_ptr + i_n, tl.where(is_best, target, best).to(tl.int64))
        if GRADIENT:
            weight = tl.where(counts, tl.load(weight_ptr + i_n * weight_step), 0.0)
            factor = tl.where(weight == 0.0, 0.0, weight * tl.sigmoid(gap))
            if SCALED:
                tl.store(factor_ptr + i_n, factor / _FP16_SCALE)
                factor = tl.where(factor == 0.0, 0.0, _FP16_SCALE)
            of_others = factor / tl.where(mass > 0.0, mass, 1.0)
            p_dz = dz_ptr + i_n * dz_row
            _store_gradient(p_z, p_dz, target, maximum, of_others, -factor, V, softcap, SOFTCAP, BLOCK)


def softmax_loss(
    z: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    softcap: float | None = None,
    nll: torch.Tensor,
    predicted: torch.Tensor,
    factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss and arg-max of each row of logits, and where `weights` are given the gradient at the logits, in place.

    z [N, V] float32, contiguous rows; targets [N] int64, −1 = ignored, otherwise below V (not checked on the device);
    weights [N] float32. nll [N] float32 is unweighted, 0 where ignored; predicted [N] int64 is the lowest arg-max.

    Returns dz [N, V] in `dtype`, in z's own memory, with rows as far apart as z's: weights · d nll/dz, 0 where ignored
    or where the weight is 0. Where `factor` [N] float32 is given it receives a factor that each row of dz still lacks;
    dz is then between −2¹⁵ and 2¹⁵, which float16 needs. Without weights z stays, and is returned.
    Raises ValueError where shapes or types do not fit.
    """
    rows, vocabulary = z.shape
    checks.shape("targets", targets, (rows,))
    checks.shape("nll", nll, (rows,))
    checks.shape("predicted", predicted, (rows,))
    if z.dtype != torch.float32 or (z.stride(1) != 1 and vocabulary > 1) or not nll.is_contiguous():
        raise ValueError(f"logits are float32 with contiguous rows, not {z.dtype} with strides {z.stride()}")
    if dtype.itemsize > 4:
        raise ValueError(f"a gradient in {dtype} does not fit into the memory of float32 logits")
    if dtype == torch.float16 and weights is not None and factor is None:
        raise ValueError("a gradient in float16 needs `factor`")
    dz = z
    if weights is not None:
        checks.shape("weights", weights, (rows,))
        flat = z.as_strided(((rows - 1) * z.stride(0) + vocabulary,), (1,)) if rows else z.flatten()
        dz = flat.view(dtype).as_strided((rows, vocabulary), (z.stride(0) * 4 // dtype.itemsize, 1))
    if not rows:
        return dz
    options = launch.options("softmax_loss", launch.architecture(z.device), dtype=torch.float32, width=vocabulary)
    programs = min(rows, options["PROGRAMS"])
    launch.run(
        softmax_loss_kernel, (programs,),
        z, dz, targets, nll if weights is None else weights, nll, predicted, nll if factor is None else factor,
        rows, vocabulary, softcap or 1.0, z.stride(0), dz.stride(0),
        targets.stride(0), 1 if weights is None else weights.stride(0),
        GRADIENT=weights is not None, SOFTCAP=softcap is not None, SCALED=factor is not None,
        **{name: value for name, value in options.items() if name != "PROGRAMS"},
    )  # fmt: skip
    return dz
