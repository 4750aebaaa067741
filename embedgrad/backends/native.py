"""The native backend: the functions of `reference` on the project's own C++ (csrc/), for models on CPUs.

Numbers are stored in float32 or bfloat16 and summed in float32. What csrc/ does not do is handed to `reference`:
float64 and float16 tensors, a softcap, rows that are not contiguous, and the ops that are mostly a call into BLAS.
Equations and shapes are those of `reference`. `*_bytes` say how much memory an op takes from its `workspace` (uint8);
without one it allocates that itself. Importing this raises ImportError where csrc/ was not built or does not fit the
installed torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from embedgrad.backends import native_core, reference
from embedgrad.backends.reference import decode_attention
from embedgrad.optimizer import StepReport
from embedgrad.tree import TreeMask
from embedgrad.trust_region import CosineCone, L2Ball, MeanCosine, NoRegion, Penalty, TrustRegion

__all__ = [
    "INSTRUCTION_SETS", "NAME", "add_rms_norm", "decode_attention", "embed", "embed_backward", "instruction_set",
    "linear_cross_entropy", "linear_cross_entropy_bytes", "prompt_step", "rms_norm", "rms_norm_backward", "rope",
    "rope_backward", "swiglu", "swiglu_backward", "tree_attention", "tree_attention_backward",
    "tree_attention_backward_bytes", "tree_attention_bytes", "using",
]  # fmt: skip

NAME = "native"
INSTRUCTION_SETS = (
    "plain",
    "avx2",
    "avx512",
    "avx512vnni",
)  # from the least to the most; "avx512vnni": products of bytes
BLOCK_ROWS = 96  # rows (queries · heads of a group) that share one read of a key
TABLE_ROWS = 256  # rows of a packed embedding table that are dequantised at once


def _load() -> None:
    path = native_core.library_path()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(f"csrc/ was built for another torch: {error}") from error
    for name in (
        "rms_norm", "add_rms_norm", "rms_norm_backward", "rope", "rope_backward", "swiglu", "swiglu_backward",
        "softmax_loss", "embed", "embed_backward", "prompt_step", "tree_attention", "tree_attention_backward",
    ):  # fmt: skip
        torch.library.register_fake(f"embedgrad::{name}", lambda *_, **__: None)

    def schedule(key_begin: Tensor, *_: Any) -> Tensor:
        return key_begin.new_empty(torch.library.get_ctx().new_dynamic_size())

    torch.library.register_fake("embedgrad::tree_schedule", schedule)


_load()
_ops = torch.ops.embedgrad


def instruction_set() -> str:
    """One of INSTRUCTION_SETS: what the ops use, the best that this machine has."""
    return _ops.isa()


@contextmanager
def using(instruction_set: str) -> Iterator[None]:
    """Inside, the ops use this instruction set. Raises ValueError where the machine has not got it."""
    before = _ops.isa()
    _ops.use_isa(instruction_set)
    try:
        yield
    finally:
        _ops.use_isa(before)


def _fits(*tensors: Tensor | None) -> bool:
    """Whether they are stored alike, in a type and with rows that csrc/ takes."""
    dtype = None
    for x in tensors:
        if x is None:
            continue
        if dtype is None:
            dtype = x.dtype
            if dtype is not torch.float32 and dtype is not torch.bfloat16:
                return False
        if x.dtype is not dtype or not x.is_cpu or (x.stride(-1) != 1 and x.shape[-1] > 1):
            return False
    return True


def _workspace(workspace: Tensor | None, nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8) if workspace is None else workspace


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor) -> Tensor:
    """out = x·rsqrt(mean(x²) + eps) ⊙ weight; x, out [T, d], weight [d]."""
    if not _fits(x, weight, out):
        return reference.rms_norm(x, weight, eps, out=out)
    _ops.rms_norm(x, weight, eps, out)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, out: Tensor) -> Tensor:
    """x += residual in place, then `rms_norm`."""
    if not _fits(x, residual, weight, out):
        return reference.add_rms_norm(x, residual, weight, eps, out=out)
    _ops.add_rms_norm(x, residual, weight, eps, out)
    return out


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float, *, dx: Tensor) -> Tensor:
    """dx += the gradient of `rms_norm` with respect to x; dy, x, dx [T, d], weight [d]."""
    if not _fits(dy, x, weight, dx):
        return reference.rms_norm_backward(dy, x, weight, eps, dx=dx)
    _ops.rms_norm_backward(dy, x, weight, eps, dx)
    return dx


def rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: tuple[int, int, int],
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Norm q and k where weights [D] are given, and rotate them, in place in qkv [T, (H + 2G)·D]; cos, sin [T, D/2]."""
    if not _fits(qkv, cos, sin, q_norm, k_norm):
        return reference.rope(qkv, cos, sin, heads, q_norm=q_norm, k_norm=k_norm, eps=eps)
    _ops.rope(qkv, cos.contiguous(), sin.contiguous(), *heads, q_norm, k_norm, eps)
    return qkv


def rope_backward(
    dqkv: Tensor,
    qkv_raw: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: tuple[int, int, int],
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """The transpose of `rope`, in place on dqkv [T, (H + 2G)·D]."""
    if not _fits(dqkv, qkv_raw, cos, sin, q_norm, k_norm):
        return reference.rope_backward(dqkv, qkv_raw, cos, sin, heads, q_norm=q_norm, k_norm=k_norm, eps=eps)
    _ops.rope_backward(dqkv, qkv_raw, cos.contiguous(), sin.contiguous(), *heads, q_norm, k_norm, eps)
    return dqkv


def swiglu(gate_up: Tensor, *, out: Tensor) -> Tensor:
    """out = g σ(g) ⊙ u; gate_up = [g, u] [T, 2F], out [T, F]."""
    if not _fits(gate_up, out):
        return reference.swiglu(gate_up, out=out)
    _ops.swiglu(gate_up, out)
    return out


def swiglu_backward(da: Tensor, gate_up: Tensor, *, out: Tensor) -> Tensor:
    """out = [dg, du]; da [T, F], gate_up, out [T, 2F]; out may be gate_up itself."""
    if not _fits(da, gate_up, out):
        return reference.swiglu_backward(da, gate_up, out=out)
    _ops.swiglu_backward(da, gate_up, out)
    return out


def embed(rows: Tensor, table: Any, ids: Tensor, prompt_rows: Tensor, *, out: Tensor) -> Tensor:
    """out[i] = rows[prompt_rows[i]] where a prompt row is shown, else table[ids[i]]; rows [k, d], out [P, d].

    table [V, d]: a tensor, or a packed table, of which some rows are dequantised at a time.
    """
    if not _fits(out) or not _fits(rows):
        return reference.embed(rows, table, ids, prompt_rows, out=out)
    rows, ids, prompt_rows = rows.float(), ids.contiguous(), prompt_rows.contiguous()
    if isinstance(table, Tensor) and _fits(table):
        _ops.embed(rows, table, ids, prompt_rows, out)
        return out
    for start in range(0, len(ids), TABLE_ROWS):
        block = slice(start, start + TABLE_ROWS)
        out[block] = table[ids[block]]
    _ops.embed(rows, None, ids, prompt_rows, out)
    return out


def embed_backward(dx: Tensor, prompt_rows: Tensor, *, grad: Tensor) -> Tensor:
    """grad[r] = Σ of dx[i] over the positions i that show row r, in order of position; dx [P, d], grad [k, d]."""
    if not _fits(dx) or not _fits(grad) or grad.dtype != torch.float32:
        return reference.embed_backward(dx, prompt_rows, grad=grad)
    _ops.embed_backward(dx, prompt_rows.contiguous(), grad)
    return grad


_KINDS = {NoRegion: 0, Penalty: 0, CosineCone: 1, L2Ball: 2, MeanCosine: 3}  # as csrc/cpu/prompt_step.h counts them


def prompt_step(
    e: Tensor,
    e0: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    step: int,
    lr: float,
    region: TrustRegion,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> StepReport:
    """`optimizer.prompt_step` a row at a time; a float64 prompt and regions unknown to csrc/ take the plain form.

    As there, `g` holds a penalty's share already.
    """
    kind = _KINDS.get(type(region))
    if kind is None or e.dtype != torch.float32 or not _fits(e, e0, m, v, g):
        return reference.prompt_step(
            e, e0, m, v, g, step=step, lr=lr, region=region, betas=betas, eps=eps, weight_decay=weight_decay
        )
    k = e.shape[0]
    similarity, ratio = torch.empty(k, dtype=torch.float64), torch.empty(k, dtype=torch.float64)
    projected = torch.empty(k, dtype=torch.bool)
    (beta1, beta2), settings = betas, vars(region)
    adamw = [
        1 - beta1, beta2, 1 - beta2, 1 - lr * weight_decay, lr / (1 - beta1**step), math.sqrt(1 - beta2**step), eps,
    ]  # fmt: skip
    _ops.prompt_step(
        e, e0, m, v, g, adamw, kind, settings.get("tau", 0.0), settings.get("norm_min"), settings.get("norm_max"),
        settings.get("radius", 0.0), settings.get("relative", True), similarity, ratio, projected,
    )  # fmt: skip
    return StepReport(similarity, ratio, projected)


def _logit_rows(count: int, vocabulary: int, logit_bytes: int | None) -> int:
    limit = reference.LOGIT_BYTES if logit_bytes is None else logit_bytes
    return min(count, max(1, limit // (vocabulary * 4)))


def linear_cross_entropy_bytes(count: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Bytes that `linear_cross_entropy` takes: the logits of some rows, in float32."""
    return _logit_rows(count, vocabulary, None) * vocabulary * 4


def linear_cross_entropy(
    h: Tensor,
    head: reference.Head,
    targets: Tensor,
    weights: Tensor,
    *,
    softcap: float | None = None,
    dh: Tensor | None = None,
    logit_bytes: int | None = None,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood [N] of `targets` under softmax(h Wᵀ), and the arg-max token [N]; see `reference`.

    The products are the head's; loss and gradient are computed in place in the one buffer of logits, which is float32.
    """
    if softcap is not None or not _fits(h, dh) or weights.dtype != torch.float32:
        return reference.linear_cross_entropy(
            h, head, targets, weights, softcap=softcap, dh=dh, logit_bytes=logit_bytes
        )
    vocabulary, count = head.shape[0], len(h)
    step = _logit_rows(count, vocabulary, logit_bytes)
    memory = _workspace(workspace, step * vocabulary * 4)
    buffer = memory[: step * vocabulary * 4].view(torch.float32).view(step, vocabulary)
    nll, predicted = torch.empty(count), torch.empty(count, dtype=torch.int64)
    targets, weights = targets.contiguous(), weights.contiguous()
    for start in range(0, count, max(1, step)):
        rows = slice(start, min(start + step, count))
        z = head.forward(h[rows], out=buffer[: rows.stop - start])
        _ops.softmax_loss(z, targets[rows], None if dh is None else weights[rows], nll[rows], predicted[rows])
        if dh is not None:
            head.backward(z, out=dh[rows])
    return nll, predicted


def _block_queries(group: int) -> int:
    return max(1, BLOCK_ROWS // group)


def _schedule(mask: TreeMask, group: int) -> tuple[Tensor | int | None, ...]:
    """The mask as csrc/ takes it and what each block of queries sees; made once per mask and used by every layer."""

    def indices(x: Tensor | None) -> Tensor | None:
        return None if x is None or mask.window is None else x.int().contiguous()

    def plan() -> tuple[Tensor | int | None, ...]:
        blocks = mask.query_slices(_block_queries(group))
        starts = torch.tensor([*(block.start for block in blocks), len(mask.query_index)], dtype=torch.int32)
        shared = (mask.key_begin.contiguous(), mask.key_end.contiguous(), mask.query_index.contiguous(), starts)
        positions = (indices(mask.query_position), indices(mask.key_position), mask.window or 0)
        return (*shared, _ops.tree_schedule(*shared, *positions), mask.kept, *positions)

    return mask.cached(("native", group), plan)


def _heads_fit(*tensors: Tensor | None) -> bool:
    return _fits(*tensors) and all(
        x is None or x.dim() != 3 or x.stride(1) == x.shape[2] or x.shape[1] <= 1 for x in tensors
    )


def tree_attention_bytes(queries: int, keys: int, heads: tuple[int, int, int]) -> int:
    """Bytes that `tree_attention` takes on torch's threads: keys in panels, and each thread's block."""
    h, g, size = heads
    return _ops.tree_attention_bytes(keys, g, size, min(queries, _block_queries(h // g)) * (h // g))


def tree_attention_backward_bytes(
    queries: int, keys: int, heads: tuple[int, int, int], *, dq: bool = True, dkv: bool = True
) -> int:
    """Bytes that `tree_attention_backward` takes: as above, and each thread's sums of dk and dv."""
    h, g, size = heads
    rows = min(queries, _block_queries(h // g)) * (h // g)
    return _ops.tree_attention_backward_bytes(keys, g, size, rows, dq, dkv)


def _sizes(q: Tensor, k: Tensor) -> tuple[int, int, tuple[int, int, int]]:
    return len(q), len(k), (q.shape[1], k.shape[1], q.shape[2])


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TreeMask,
    *,
    scale: float,
    softcap: float | None = None,
    out: Tensor,
    lse: Tensor,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o and lse; q, out [Nq, H, D]; k, v [S, G, D]; lse [Nq, H] float32."""
    fits = _heads_fit(q, k, v, out) and lse.dtype == torch.float32 and lse.is_contiguous()
    if softcap is not None or not fits:
        return reference.tree_attention(q, k, v, mask, scale=scale, softcap=softcap, out=out, lse=lse)
    memory = _workspace(workspace, tree_attention_bytes(*_sizes(q, k)))
    _ops.tree_attention(q, k, v, *_schedule(mask, q.shape[1] // k.shape[1]), scale, out, lse, memory)
    return out, lse


def tree_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: TreeMask,
    *,
    scale: float,
    softcap: float | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    workspace: Tensor | None = None,
) -> None:
    """dq [Nq, H, D]; dk and dv [S − mask.kept, G, D]; what is None is not computed."""
    fits = _heads_fit(do, q, k, v, o, dq, dk, dv) and lse.dtype == torch.float32 and lse.is_contiguous()
    if softcap is not None or not fits or (dk is None) != (dv is None):
        reference.tree_attention_backward(do, q, k, v, o, lse, mask, scale=scale, softcap=softcap, dq=dq, dk=dk, dv=dv)
        return
    needed = tree_attention_backward_bytes(*_sizes(q, k), dq=dq is not None, dkv=dk is not None)
    schedule = _schedule(mask, q.shape[1] // k.shape[1])
    _ops.tree_attention_backward(do, q, k, v, o, lse, *schedule, scale, dq, dk, dv, _workspace(workspace, needed))
