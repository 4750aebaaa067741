# mypy: allow-untyped-defs
"""SwiGLU and GeGLU on the fused gate/up buffer, forward and backward.

    a = g σ(z) ⊙ u                                     (Shazeer, arXiv 2002.05202)
    dg = da ⊙ u ⊙ σ(z)(1 + g z′(1 − σ(z)))             du = da ⊙ g σ(z)

SwiGLU has SiLU as the gate, z = g. GeGLU has GELU in its tanh form (Hendrycks and Gimpel, arXiv 1606.08415):
½ g (1 + tanh(z/2)) = g σ(z) with z = 2√(2/π)(g + 0.044715 g³). Both move the same bytes, and have the same launch rows.

g and u are the halves of one row of gate_up [T, 2F]. Arithmetic is fp32; g σ(z) is rounded to the buffer's type before
the product with u, where transformers rounds it. Every program reads and writes the same elements, so the outputs
may alias the inputs element for element. The down projection is frozen and has no gradient, so the backward does not
need the activation.
"""

import torch
import triton
import triton.language as tl

from . import checks, launch


@triton.jit
def _gelu_argument(b_g):
    """z = 2√(2/π)(g + 0.044715 g³)"""
    return 1.595769121605731 * (b_g + 0.044715 * b_g * b_g * b_g)


@triton.jit
def _gelu_slope(b_g):
    """z′ = 2√(2/π)(1 + 3 · 0.044715 g²)"""
    return 1.595769121605731 + 0.2140644488178509 * b_g * b_g


@triton.jit
def swiglu_kernel(
    gate_up_ptr, out_ptr, F, n_blocks, gate_up_row, gate_up_col, gate_up_half, out_row, out_col,
    BLOCK: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """One block of one row: out = round(g σ(z)) ⊙ u."""
    pid = tl.program_id(0)
    i_t = (pid // n_blocks).to(tl.int64)
    o_f = (pid % n_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_f = o_f < F
    p_gate = gate_up_ptr + i_t * gate_up_row + o_f * gate_up_col
    # [BLOCK]
    b_gate = tl.load(p_gate, mask=m_f, other=0.0)
    b_up = tl.load(p_gate + gate_up_half, mask=m_f, other=0.0).to(tl.float32)
    b_wide = b_gate.to(tl.float32)
    b_z = _gelu_argument(b_wide) if GELU else b_wide
    b_silu = (b_wide * tl.sigmoid(b_z)).to(b_gate.dtype).to(tl.float32)
    tl.store(out_ptr + i_t * out_row + o_f * out_col, b_silu * b_up, mask=m_f)


@triton.jit
def swiglu_backward_kernel(
    da_ptr, gate_up_ptr, out_ptr, F, n_blocks,
    da_row, da_col, gate_up_row, gate_up_col, gate_up_half, out_row, out_col, out_half,
    BLOCK: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """One block of one row: out = [dg, du]."""
    pid = tl.program_id(0)
    i_t = (pid // n_blocks).to(tl.int64)
    o_f = (pid % n_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_f = o_f < F
    p_gate = gate_up_ptr + i_t * gate_up_row + o_f * gate_up_col
    # [BLOCK]
    b_gate = tl.load(p_gate, mask=m_f, other=0.0)
    b_up = tl.load(p_gate + gate_up_half, mask=m_f, other=0.0).to(tl.float32)
    b_da = tl.load(da_ptr + i_t * da_row + o_f * da_col, mask=m_f, other=0.0).to(tl.float32)
    b_wide = b_gate.to(tl.float32)
    b_sigma = tl.sigmoid(_gelu_argument(b_wide) if GELU else b_wide)
    b_silu = b_wide * b_sigma
    b_silu_slope = b_silu * _gelu_slope(b_wide) if GELU else b_silu
    p_out = out_ptr + i_t * out_row + o_f * out_col
    # σ(1 + g z′(1 − σ)) = σ + gσ z′(1 − σ)
    tl.store(p_out, b_da * b_up * (b_sigma + b_silu_slope * (1.0 - b_sigma)), mask=m_f)
    tl.store(p_out + out_half, b_da * b_silu, mask=m_f)


def swiglu(gate_up: torch.Tensor, *, out: torch.Tensor, gelu: bool = False) -> torch.Tensor:
    """out [T, F] = g σ(z) ⊙ u for gate_up = [g, u] [T, 2F]; float32, float16 or bfloat16, any strides.

    gelu: GeGLU instead of SwiGLU.

    Raises ValueError where shapes or types do not fit, or `out` is expanded.
    """
    rows, width = _halves(gate_up)
    checks.shape("out", out, (rows, width))
    checks.floating(gate_up=gate_up, out=out)
    checks.writable(out=out)
    options = launch.options("swiglu", launch.architecture(gate_up.device), dtype=gate_up.dtype, width=width)
    blocks = triton.cdiv(width, options["BLOCK"])
    launch.run(
        swiglu_kernel, (rows * blocks,),
        gate_up, out, width, blocks, *gate_up.stride(), width * gate_up.stride(1), *out.stride(), GELU=gelu, **options
    )  # fmt: skip
    return out


def swiglu_backward(da: torch.Tensor, gate_up: torch.Tensor, *, out: torch.Tensor, gelu: bool = False) -> torch.Tensor:
    """out [T, 2F] = [dg, du]; da [T, F] (may be expanded), gate_up [T, 2F]. `out` may be gate_up itself.

    Raises ValueError where shapes or types do not fit, or an output is expanded.
    """
    rows, width = _halves(gate_up)
    checks.shape("da", da, (rows, width))
    checks.shape("out", out, gate_up.shape)
    checks.floating(da=da, gate_up=gate_up, out=out)
    checks.writable(out=out)
    options = launch.options("swiglu_backward", launch.architecture(da.device), dtype=gate_up.dtype, width=width)
    blocks = triton.cdiv(width, options["BLOCK"])
    launch.run(
        swiglu_backward_kernel, (rows * blocks,),
        da, gate_up, out, width, blocks,
        *da.stride(), *gate_up.stride(), width * gate_up.stride(1), *out.stride(), width * out.stride(1),
        GELU=gelu, **options,
    )  # fmt: skip
    return out


def _halves(gate_up: torch.Tensor) -> tuple[int, int]:
    rows, double = gate_up.shape
    if double % 2:
        raise ValueError(f"gate_up has {double} columns, but its halves must be equally wide")
    return rows, double // 2
