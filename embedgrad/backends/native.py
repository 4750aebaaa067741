"""The native backend: the functions of `reference` on the project's own C++ (csrc/), for float32 models on CPUs.

What csrc/ does not do is handed to `reference`: float64 and 16-bit tensors, a softcap, rows that are not contiguous,
and the ops that are mostly a call into BLAS. Equations and shapes are those of `reference`. Importing this raises
ImportError where csrc/ was not built or does not fit the installed torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from embedgrad.backends import native_core, reference
from embedgrad.backends.reference import (
    decode_attention,
    embed,
    embed_backward,
    prompt_step,
)
from embedgrad.tree import TreeMask

__all__ = [
    "INSTRUCTION_SETS", "NAME", "add_rms_norm", "decode_attention", "embed", "embed_backward", "instruction_set",
    "linear_cross_entropy",
    "prompt_step", "rms_norm", "rms_norm_backward", "rope", "rope_backward", "swiglu", "swiglu_backward",
    "tree_attention", "tree_attention_backward", "using",
]  # fmt: skip

NAME = "native"
INSTRUCTION_SETS = (
    "plain",
    "avx2",
    "avx512",
    "avx512vnni",
)  # from the least to the most; "avx512vnni": products of bytes
BLOCK_ROWS = 96  # rows (queries · heads of a group) that share one read of a key


def _load() -> None:
    path = native_core.library_path()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(f"csrc/ was built for another torch: {error}") from error
    for name in (
        "rms_norm", "add_rms_norm", "rms_norm_backward", "rope", "rope_backward", "swiglu", "swiglu_backward",
        "softmax_loss", "tree_attention", "tree_attention_backward",
    ):  # fmt: skip
        torch.library.register_fake(f"embedgrad::{name}", lambda *_, **__: None)


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
    return all(
        x is None or (x.dtype == torch.float32 and x.device.type == "cpu" and (x.stride(-1) == 1 or x.shape[-1] <= 1))
        for x in tensors
    )


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


def linear_cross_entropy(
    h: Tensor,
    head: reference.Head,
    targets: Tensor,
    weights: Tensor,
    *,
    softcap: float | None = None,
    dh: Tensor | None = None,
    logit_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood [N] of `targets` under softmax(h Wᵀ), and the arg-max token [N]; see `reference`.

    The products are the head's; loss and gradient are computed in place in the one buffer of logits.
    """
    if softcap is not None or not _fits(h, weights, dh):
        return reference.linear_cross_entropy(
            h, head, targets, weights, softcap=softcap, dh=dh, logit_bytes=logit_bytes
        )
    vocabulary, count = head.shape[0], len(h)
    step = max(1, (reference.LOGIT_BYTES if logit_bytes is None else logit_bytes) // (vocabulary * 4))
    buffer = torch.empty(min(step, count), vocabulary)
    nll, predicted = torch.empty(count), torch.empty(count, dtype=torch.int64)
    targets, weights = targets.contiguous(), weights.contiguous()
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        z = head.forward(h[rows], out=buffer[: rows.stop - start])
        _ops.softmax_loss(z, targets[rows], None if dh is None else weights[rows], nll[rows], predicted[rows])
        if dh is not None:
            head.backward(z, out=dh[rows])
    return nll, predicted


def _schedule(mask: TreeMask, group: int) -> tuple[Tensor | int | None, ...]:
    """The mask as csrc/ takes it, and where its blocks of queries start; made once per mask and used by every layer."""

    def indices(x: Tensor | None) -> Tensor | None:
        return None if x is None or mask.window is None else x.int().contiguous()

    def plan() -> tuple[Tensor | int | None, ...]:
        blocks = mask.query_slices(max(1, BLOCK_ROWS // group))
        starts = torch.tensor([*(block.start for block in blocks), len(mask.query_index)], dtype=torch.int32)
        return (
            mask.key_begin.contiguous(), mask.key_end.contiguous(), mask.query_index.contiguous(), starts, mask.kept,
            indices(mask.query_position), indices(mask.key_position), mask.window or 0,
        )  # fmt: skip

    return mask.cached(("native", group), plan)


def _heads_fit(*tensors: Tensor | None) -> bool:
    return _fits(*tensors) and all(
        x is None or x.dim() != 3 or x.stride(1) == x.shape[2] or x.shape[1] <= 1 for x in tensors
    )


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
) -> tuple[Tensor, Tensor]:
    """o and lse; q, out [Nq, H, D]; k, v [S, G, D]; lse [Nq, H]."""
    if softcap is not None or not _heads_fit(q, k, v, out) or not _fits(lse) or not lse.is_contiguous():
        return reference.tree_attention(q, k, v, mask, scale=scale, softcap=softcap, out=out, lse=lse)
    _ops.tree_attention(q, k, v, *_schedule(mask, q.shape[1] // k.shape[1]), scale, out, lse)
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
) -> None:
    """dq [Nq, H, D]; dk and dv [S − mask.kept, G, D]; what is None is not computed."""
    fits = _heads_fit(do, q, k, v, o, dq, dk, dv) and _fits(lse) and lse.is_contiguous()
    if softcap is not None or not fits or (dk is None) != (dv is None):
        reference.tree_attention_backward(do, q, k, v, o, lse, mask, scale=scale, softcap=softcap, dq=dq, dk=dk, dv=dv)
        return
    schedule = _schedule(mask, q.shape[1] // k.shape[1])
    _ops.tree_attention_backward(do, q, k, v, o, lse, *schedule, scale, dq, dk, dv)
