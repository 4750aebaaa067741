# mypy: allow-untyped-defs
"""RMS norm of the residual stream, forward, and backward for a frozen weight.

    r = rsqrt(mean(x²) + ε)        x̂ = x r        y = x̂ ⊙ w
    dx += r (w ⊙ dy − x̂ · mean(x̂ ⊙ w ⊙ dy))

(Zhang and Sennrich, arXiv 1910.07467; the derivative follows from dr/dx = −r³ x/d.) The weight is frozen, so there is
no dw, and r is rebuilt in the backward: it costs no memory traffic, because x is read anyway. Sums are fp32. x̂ is
rounded to w's type before the product with w. Where that is x's type, it is what transformers' LlamaRMSNorm does; with
w in float32 nothing is rounded but the product, as in Gemma's and OLMo 2's norms.

One program has one row, which is read once and stays in registers.
"""

import torch
import triton
import triton.language as tl

from . import checks, launch

WIDEST = 16384
"""Columns of the widest row that a program can hold."""


@triton.jit
def rms_norm_kernel(x_ptr, w_ptr, out_ptr, d, eps, x_row, x_col, w_col, out_row, out_col, BLOCK: tl.constexpr):
    """One row: out = x̂ ⊙ w."""
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK).to(tl.int64)
    m_d = o_d < d
    # [BLOCK]
    b_x = tl.load(x_ptr + i_t * x_row + o_d * x_col, mask=m_d, other=0.0)
    b_w = tl.load(w_ptr + o_d * w_col, mask=m_d, other=0.0)
    b_wide = b_x.to(tl.float32)
    r = tl.rsqrt(tl.sum(b_wide * b_wide) / d + eps)
    b_hat = (b_wide * r).to(b_w.dtype).to(tl.float32)
    tl.store(out_ptr + i_t * out_row + o_d * out_col, b_hat * b_w.to(tl.float32), mask=m_d)


@triton.jit
def rms_norm_backward_kernel(
    dy_ptr, x_ptr, w_ptr, dx_ptr, d, eps,
    dy_row, dy_col, x_row, x_col, w_col, dx_row, dx_col, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: dx += r (w ⊙ dy − x̂ · mean(x̂ ⊙ w ⊙ dy))."""
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK).to(tl.int64)
    m_d = o_d < d
    p_dx = dx_ptr + i_t * dx_row + o_d * dx_col
    # [BLOCK]
    b_x = tl.load(x_ptr + i_t * x_row + o_d * x_col, mask=m_d, other=0.0).to(tl.float32)
    b_dy = tl.load(dy_ptr + i_t * dy_row + o_d * dy_col, mask=m_d, other=0.0).to(tl.float32)
    b_wdy = b_dy * tl.load(w_ptr + o_d * w_col, mask=m_d, other=0.0).to(tl.float32)
    b_dx = tl.load(p_dx, mask=m_d, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(b_x * b_x) / d + eps)
    mean = tl.sum(b_x * b_wdy) * r / d
    tl.store(p_dx, b_dx + r * (b_wdy - b_x * r * mean), mask=m_d)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, out: torch.Tensor) -> torch.Tensor:
    """out = x·rsqrt(mean(x²) + eps) ⊙ weight; x, out [T, d], weight [d], float32, float16 or bfloat16, any strides.

    Raises ValueError where shapes or types do not fit, a row is wider than WIDEST, or `out` is expanded.
    """
    rows, d = x.shape
    _check(d, weight, x=x, out=out)
    checks.writable(out=out)
    options = launch.options("rms_norm", launch.architecture(x.device), dtype=x.dtype, width=d)
    launch.run(
        rms_norm_kernel, (rows,), x, weight, out, d, eps, *x.stride(), *weight.stride(), *out.stride(), **options
    )
    return out


def rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, *, dx: torch.Tensor
) -> torch.Tensor:
    """dx += the gradient of `rms_norm` with respect to x; dy, x, dx [T, d] (dy may be expanded), weight [d].

    Raises ValueError where shapes or types do not fit, a row is wider than WIDEST, or `dx` is expanded.
    """
    rows, d = x.shape
    _check(d, weight, x=x, dy=dy, dx=dx)
    checks.writable(dx=dx)
    options = launch.options("rms_norm_backward", launch.architecture(x.device), dtype=x.dtype, width=d)
    launch.run(
        rms_norm_backward_kernel, (rows,),
        dy, x, weight, dx, d, eps,
        *dy.stride(), *x.stride(), *weight.stride(), *dx.stride(), **options,
    )  # fmt: skip
    return dx


def _check(d: int, weight: torch.Tensor, **rows: torch.Tensor) -> None:
    checks.shape("weight", weight, (d,))
    for name, x in rows.items():
        checks.shape(name, x, rows["x"].shape)
    checks.floating(weight=weight, **rows)
    if d > WIDEST:
        raise ValueError(f"rows have {d} columns; a program holds at most {WIDEST}")
