# mypy: allow-untyped-defs
"""RMS norm of the residual stream, forward (with the residual add fused) and backward for a frozen weight.

    r = rsqrt(mean(x²) + ε)        x̂ = x r        y = x̂ ⊙ w
    dx += r (w ⊙ dy − x̂ · mean(x̂ ⊙ w ⊙ dy))

(Zhang and Sennrich, arXiv 1910.07467; the derivative follows from dr/dx = −r³ x/d.) The weight is frozen, so there is
no dw, and r is rebuilt in the backward: it costs no memory traffic, because x is read anyway. Sums are fp32. x̂ is
rounded to x's type before the product with w, as transformers' LlamaRMSNorm does; with the add fused, x + residual is
rounded to x's type before it is normed, because that rounded sum is the residual stream.

One program has one row. A row that fits one block is read once and stays in registers; a wider one is walked block by
block, twice. Either way the order of the sums is fixed.
"""

import torch
import triton
import triton.language as tl

from . import checks, launch


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, w_ptr, out_ptr, d, eps,
    x_row, x_col, residual_row, residual_col, w_col, out_row, out_col,
    ADD: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: x += residual where ADD, then out = x̂ ⊙ w."""
    i_t = tl.program_id(0).to(tl.int64)
    p_x, p_out, p_residual = x_ptr + i_t * x_row, out_ptr + i_t * out_row, residual_ptr + i_t * residual_row
    o_d = tl.arange(0, BLOCK).to(tl.int64)
    if ONE_BLOCK:
        m_d = o_d < d
        # [BLOCK]
        b_x = tl.load(p_x + o_d * x_col, mask=m_d, other=0.0)
        b_w = tl.load(w_ptr + o_d * w_col, mask=m_d, other=0.0)
        if ADD:
            b_x = _add(b_x, tl.load(p_residual + o_d * residual_col, mask=m_d, other=0.0))
            tl.store(p_x + o_d * x_col, b_x, mask=m_d)
        b_wide = b_x.to(tl.float32)
        r = tl.rsqrt(tl.sum(b_wide * b_wide) / d + eps)
        tl.store(p_out + o_d * out_col, _weighted(b_wide * r, b_w, b_x.dtype), mask=m_d)
    else:
        # [BLOCK]
        b_squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, d, BLOCK):
            o_n = start + o_d
            b_x = tl.load(p_x + o_n * x_col, mask=o_n < d, other=0.0)
            if ADD:
                b_x = _add(b_x, tl.load(p_residual + o_n * residual_col, mask=o_n < d, other=0.0))
                tl.store(p_x + o_n * x_col, b_x, mask=o_n < d)
            b_wide = b_x.to(tl.float32)
            b_squares += b_wide * b_wide
        r = tl.rsqrt(tl.sum(b_squares) / d + eps)
        if ADD:
            # the second walk reads what other threads of this program stored
            tl.debug_barrier()
        for start in range(0, d, BLOCK):
            o_n = start + o_d
            b_x = tl.load(p_x + o_n * x_col, mask=o_n < d, other=0.0)
            b_w = tl.load(w_ptr + o_n * w_col, mask=o_n < d, other=0.0)
            tl.store(p_out + o_n * out_col, _weighted(b_x.to(tl.float32) * r, b_w, b_x.dtype), mask=o_n < d)


@triton.jit
def _add(b_x, b_residual):
    return (b_x.to(tl.float32) + b_residual.to(tl.float32)).to(b_x.dtype)


@triton.jit
def _weighted(b_hat, b_w, dtype: tl.constexpr):
    return b_hat.to(dtype).to(tl.float32) * b_w.to(tl.float32)


@triton.jit
def rms_norm_backward_kernel(
    dy_ptr, x_ptr, w_ptr, dx_ptr, d, eps,
    dy_row, dy_col, x_row, x_col, w_col, dx_row, dx_col,
    ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: dx += r (w ⊙ dy − x̂ · mean(x̂ ⊙ w ⊙ dy))."""
    i_t = tl.program_id(0).to(tl.int64)
    p_dy, p_x, p_dx = dy_ptr + i_t * dy_row, x_ptr + i_t * x_row, dx_ptr + i_t * dx_row
    o_d = tl.arange(0, BLOCK).to(tl.int64)
    if ONE_BLOCK:
        m_d = o_d < d
        # [BLOCK]
        b_x = tl.load(p_x + o_d * x_col, mask=m_d, other=0.0).to(tl.float32)
        b_wdy = _weighted_gradient(p_dy + o_d * dy_col, w_ptr + o_d * w_col, m_d)
        b_dx = tl.load(p_dx + o_d * dx_col, mask=m_d, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(b_x * b_x) / d + eps)
        mean = tl.sum(b_x * b_wdy) * r / d
        tl.store(p_dx + o_d * dx_col, b_dx + r * (b_wdy - b_x * r * mean), mask=m_d)
    else:
        # [BLOCK]
        b_squares = tl.zeros((BLOCK,), tl.float32)
        b_products = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, d, BLOCK):
            o_n = start + o_d
            b_x = tl.load(p_x + o_n * x_col, mask=o_n < d, other=0.0).to(tl.float32)
            b_squares += b_x * b_x
            b_products += b_x * _weighted_gradient(p_dy + o_n * dy_col, w_ptr + o_n * w_col, o_n < d)
        r = tl.rsqrt(tl.sum(b_squares) / d + eps)
        mean = tl.sum(b_products) * r / d
        for start in range(0, d, BLOCK):
            o_n = start + o_d
            b_x = tl.load(p_x + o_n * x_col, mask=o_n < d, other=0.0).to(tl.float32)
            b_wdy = _weighted_gradient(p_dy + o_n * dy_col, w_ptr + o_n * w_col, o_n < d)
            b_dx = tl.load(p_dx + o_n * dx_col, mask=o_n < d, other=0.0).to(tl.float32)
            tl.store(p_dx + o_n * dx_col, b_dx + r * (b_wdy - b_x * r * mean), mask=o_n < d)


@triton.jit
def _weighted_gradient(p_dy, p_w, mask):
    return tl.load(p_dy, mask=mask, other=0.0).to(tl.float32) * tl.load(p_w, mask=mask, other=0.0).to(tl.float32)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, out: torch.Tensor) -> torch.Tensor:
    """out = x·rsqrt(mean(x²) + eps) ⊙ weight; x, out [T, d], weight [d], float32, float16 or bfloat16, any strides.

    Raises ValueError where shapes or types do not fit, or `out` is expanded.
    """
    return _forward(x, None, weight, eps, out)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, out: torch.Tensor
) -> torch.Tensor:
    """x += residual in place, then `rms_norm` of the sum; x, residual, out [T, d], weight [d].

    Raises ValueError where shapes or types do not fit, or `x` or `out` is expanded.
    """
    checks.shape("residual", residual, x.shape)
    checks.floating(residual=residual)
    checks.writable(x=x)
    return _forward(x, residual, weight, eps, out)


def _forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> torch.Tensor:
    rows, d = x.shape
    checks.shape("weight", weight, (d,))
    checks.shape("out", out, (rows, d))
    checks.floating(x=x, weight=weight, out=out)
    checks.writable(out=out)
    options = launch.options("rms_norm", launch.architecture(x.device), dtype=x.dtype, width=d)
    other = x if residual is None else residual
    rms_norm_kernel[(rows,)](
        x, other, weight, out, d, eps,
        *x.stride(), *other.stride(), *weight.stride(), *out.stride(),
        ADD=residual is not None, ONE_BLOCK=options["BLOCK"] >= d, **options,
    )  # fmt: skip
    return out


def rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, *, dx: torch.Tensor
) -> torch.Tensor:
    """dx += the gradient of `rms_norm` with respect to x; dy, x, dx [T, d] (dy may be expanded), weight [d].

    Raises ValueError where shapes or types do not fit, or `dx` is expanded.
    """
    rows, d = x.shape
    checks.shape("dy", dy, (rows, d))
    checks.shape("weight", weight, (d,))
    checks.shape("dx", dx, (rows, d))
    checks.floating(dy=dy, x=x, weight=weight, dx=dx)
    checks.writable(dx=dx)
    options = launch.options("rms_norm_backward", launch.architecture(x.device), dtype=x.dtype, width=d)
    rms_norm_backward_kernel[(rows,)](
        dy, x, weight, dx, d, eps,
        *dy.stride(), *x.stride(), *weight.stride(), *dx.stride(),
        ONE_BLOCK=options["BLOCK"] >= d, **options,
    )  # fmt: skip
    return dx
