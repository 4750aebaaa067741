# mypy: allow-untyped-defs
"""The embedding gather that shows prompt rows, and the index-add of their gradient.

    out[t] = e[row[t]] where row[t] ≥ 0, else table[ids[t]]
    grad[r] = Σ dx[t] over the positions t with row[t] = r, in ascending order of t

The table is frozen: only the k prompt rows have a gradient. A row shown at many positions (a prompt behind the
question stands in every branch of the tree) is one program's loop over the row's own list of positions, so there are no
atomics and the order of the sum is the order of the text. The lists are a stable sort of row[], made on the device
without reading anything back.
"""

import torch
import triton
import triton.language as tl

from . import checks, launch


@triton.jit
def embed_kernel(
    e_ptr, table_ptr, ids_ptr, rows_ptr, out_ptr, d, n_blocks,
    e_row, e_col, table_row, table_col, ids_step, rows_step, out_row, out_col, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one token's embedding."""
    pid = tl.program_id(0)
    i_t = (pid // n_blocks).to(tl.int64)
    o_d = (pid % n_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < d
    row = tl.load(rows_ptr + i_t * rows_step).to(tl.int64)
    p_out = out_ptr + i_t * out_row + o_d * out_col
    # [BLOCK]
    if row >= 0:
        b_e = tl.load(e_ptr + row * e_row + o_d * e_col, mask=m_d, other=0.0)
        tl.store(p_out, b_e.to(tl.float32), mask=m_d)
    else:
        token = tl.load(ids_ptr + i_t * ids_step).to(tl.int64)
        b_table = tl.load(table_ptr + token * table_row + o_d * table_col, mask=m_d, other=0.0)
        tl.store(p_out, b_table.to(tl.float32), mask=m_d)


@triton.jit
def embed_backward_kernel(
    dx_ptr, order_ptr, begin_ptr, grad_ptr, d, n_blocks,
    dx_row, dx_col, grad_row, grad_col, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one prompt row: the sum over its positions order[begin[r]:begin[r + 1]]."""
    pid = tl.program_id(0)
    i_r = (pid // n_blocks).to(tl.int64)
    o_d = (pid % n_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < d
    # [BLOCK]
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(begin_ptr + i_r), tl.load(begin_ptr + i_r + 1)):
        position = tl.load(order_ptr + i)
        b_sum += tl.load(dx_ptr + position * dx_row + o_d * dx_col, mask=m_d, other=0.0).to(tl.float32)
    tl.store(grad_ptr + i_r * grad_row + o_d * grad_col, b_sum, mask=m_d)


def embed(
    rows: torch.Tensor, table: torch.Tensor, ids: torch.Tensor, prompt_rows: torch.Tensor, *, out: torch.Tensor
) -> torch.Tensor:
    """out[t] = rows[prompt_rows[t]] where that is ≥ 0, else table[ids[t]], converted to out's type.

    rows [k, d], table [V, d], out [T, d]; ids, prompt_rows [T] integers. ids are not read where a prompt row is shown.
    Indices must be in range: the device does not check them. Raises ValueError where shapes or types do not fit.
    """
    tokens, d = out.shape
    checks.shape("ids", ids, (tokens,))
    checks.shape("prompt_rows", prompt_rows, (tokens,))
    checks.shape("rows", rows, (len(rows), d))
    checks.shape("table", table, (len(table), d))
    checks.floating(rows=rows, table=table, out=out)
    checks.writable(out=out)
    options = launch.options("embed", launch.architecture(out.device), dtype=out.dtype, width=d)
    blocks = triton.cdiv(d, options["BLOCK"])
    launch.run(
        embed_kernel, (tokens * blocks,),
        rows, table, ids, prompt_rows, out, d, blocks,
        *rows.stride(), *table.stride(), *ids.stride(), *prompt_rows.stride(), *out.stride(), **options,
    )  # fmt: skip
    return out


def embed_backward(dx: torch.Tensor, prompt_rows: torch.Tensor, *, grad: torch.Tensor) -> torch.Tensor:
    """grad[r] = Σ dx[t] over the positions t that show row r (0 where none does); dx [T, d], grad [k, d] float32.

    prompt_rows [T] integers, −1 where no row is shown. grad is overwritten. Two launches give equal bits.
    Raises ValueError where shapes or types do not fit, or grad is expanded.
    """
    tokens, d = dx.shape
    k = len(grad)
    checks.shape("prompt_rows", prompt_rows, (tokens,))
    checks.shape("grad", grad, (k, d))
    checks.floating(dx=dx)
    checks.writable(grad=grad)
    if grad.dtype != torch.float32:
        raise ValueError(f"grad holds {grad.dtype}, but sums are kept in float32")
    shown, order = torch.sort(prompt_rows, stable=True)
    begin = torch.searchsorted(shown, torch.arange(k + 1, dtype=shown.dtype, device=shown.device))
    options = launch.options("embed_backward", launch.architecture(dx.device), dtype=dx.dtype, width=d)
    blocks = triton.cdiv(d, options["BLOCK"])
    launch.run(
        embed_backward_kernel, (k * blocks,), dx, order, begin, grad, d, blocks, *dx.stride(), *grad.stride(), **options
    )
    return grad
